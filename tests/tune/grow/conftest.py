from tests.student.conftest import compiled

__all__ = ["compiled"]
