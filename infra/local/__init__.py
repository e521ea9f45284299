"""The local stack: a Ray head, an S3 server and an MLflow server, as processes of this machine."""

from infra.local.errors import StackError
from infra.local.layout import Stack
from infra.local.stack import down, find, problems, up

__all__ = ["Stack", "StackError", "down", "find", "problems", "up"]
