"""A student for programs that know nothing of Retort: a folder with a plain loader, ONNX files, and a model card."""
