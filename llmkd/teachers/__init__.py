"""Teachers: a batch in, a typed soft label out."""

from llmkd.teachers.live import LiveTeacher
from llmkd.teachers.many import ManyTeachers, Teacher, as_teacher
from llmkd.teachers.stored import StoredTeacher

__all__ = ["LiveTeacher", "ManyTeachers", "StoredTeacher", "Teacher", "as_teacher"]
