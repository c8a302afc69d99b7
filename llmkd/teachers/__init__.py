"""Teachers: a batch in, a typed soft label out."""

from llmkd.teachers.live import LiveTeacher

__all__ = ["LiveTeacher"]
