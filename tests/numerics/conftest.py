from tests.student.conftest import compiled, model, shards

__all__ = ["compiled", "model", "shards"]
