"""Teachers: a batch in, a typed soft label out."""

from llmkd.teachers.live import LiveTeacher
from llmkd.teachers.many import ManyTeachers, Teacher, as_teacher
from llmkd.teachers.stored import StoredTeacher
from llmkd.teachers.stored_classes import StoredClasses

__all__ = ["LiveTeacher", "ManyTeachers", "StoredClasses", "StoredTeacher", "Teacher", "as_teacher"]
