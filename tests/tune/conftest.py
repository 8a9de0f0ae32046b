from tests.student.conftest import compiled, shards

__all__ = ["compiled", "shards"]
