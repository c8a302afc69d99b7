"""The student of an arm: made from the teacher's shape, or loaded; and what is refused."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from llmkd.errors import RecipeError
from llmkd.files import digest
from llmkd.methods.ernie_config import ErnieTinyConfig
from llmkd.methods.ernie_plan import Plan
from llmkd.methods.ernie_stages import StageSpec
from llmkd.methods.recipe import Recipe
from llmkd.models.embeddings import check_embeddings, take_embeddings
from llmkd.models.latent_student import with_projection
from llmkd.models.student import StudentShape, copy_layers, new_student, student_config
from llmkd.objectives.layer_map import layer_map
from llmkd.objectives.prediction import check_soft
from llmkd.teachers.attention_maps import check_maps
from llmkd.teachers.loading import commit_of, load_model, model_fingerprint, whole_weights
from llmkd.trainers.latent_losses import LatentPlan

DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
)


def config_of(plan: Plan, recipe: Recipe) -> PretrainedConfig:
    """The student's config, dropout as the recipe says; RecipeError for a shape that cannot be."""
    shape = recipe.build_one(StudentShape)
    config = student_config(shape, plan.teacher_config())
    dropout = recipe.settings["student_dropout"]
    if dropout is not None and shape.student_name_or_path is None:
        for name in DROPOUTS:
            if isinstance(getattr(config.get_text_config(), name, None), float):
                setattr(config.get_text_config(), name, dropout)
    return config


def check_student(plan: Plan, recipe: Recipe) -> None:
    """Everything about an arm's student that can be refused before anything trains: its shape and
    window, and in each stage soft loss, heads, layer map and projection.
    """
    own = config_of(plan, recipe)
    if recipe.settings["student_name_or_path"] is not None:
        plan.check_window(own, "student_name_or_path")
    student = own.get_text_config()
    if recipe.settings["student_embeddings"] == "pca":
        check_embeddings(own, plan.teacher_config())
    _check_projections(recipe)
    for spec in recipe.build_one(ErnieTinyConfig).specs():
        args = spec.args(recipe, "unused")
        if "soft" in spec.losses and plan.kind is not None:
            sources = recipe.build_one(ErnieTinyConfig).soft_entries
            check_soft(plan.kind, args.soft, mixed=len(sources) > 1)
        if "latent" in spec.losses:
            _check_latent(plan, recipe, spec, args, student)


def _check_projections(recipe: Recipe) -> None:
    """The projections walk through all stages, so these must agree on them."""
    wanted = {}
    for spec in recipe.build_one(ErnieTinyConfig).specs():
        args = spec.args(recipe, "unused")
        if "latent" in spec.losses and args.hidden:
            wanted.setdefault(args.projection, spec.name)
    if len(wanted) > 1:
        (first, one), (second, other) = list(wanted.items())[:2]
        raise RecipeError.of(
            "projection",
            second,
            f"stage {other} cannot begin with the projections ({first}) that stage {one} trained",
            "one projection for all stages of an arm",
        )


def _check_latent(plan: Plan, recipe: Recipe, spec: StageSpec, args: Any, student: Any) -> None:
    embeddings = recipe.settings["student_embeddings"]
    width = plan.teacher_config().get_text_config().hidden_size
    teacher = plan.teacher_config(spec.teacher).get_text_config()
    if args.hidden and teacher.hidden_size != width:
        raise RecipeError.of(
            "finetuned_teacher_name_or_path",
            plan.config.finetuned_teacher_name_or_path,
            f"is {teacher.hidden_size} wide and teacher_model_name_or_path {width}: one "
            "projection serves all stages",
            "name the model it was fine-tuned from: --teacher_model_name_or_path",
        )
    pairs = layer_map(student.num_hidden_layers, teacher.num_hidden_layers, args.layer_map)
    LatentPlan.of(args, pairs, student, teacher)
    if args.attn != "none":
        check_maps(plan.teacher_config(spec.teacher), "attn")
    if args.hidden and args.projection != "shared" and embeddings == "pca":
        raise RecipeError.of(
            "projection",
            args.projection,
            "student_embeddings pca needs the one projection they are seen through",
            "--projection shared",
            "--student_embeddings random",
        )
    if args.hidden and args.projection == "none" and student.hidden_size != teacher.hidden_size:
        raise RecipeError.of(
            "projection",
            "none",
            f"the student is {student.hidden_size} wide, the teacher {teacher.hidden_size}",
            "--projection shared",
        )


def student_key(plan: Plan, recipe: Recipe) -> str:
    """Hash of all that makes the student's first weights."""
    shape, seed = recipe.build_one(StudentShape), recipe.settings["seed"]
    if shape.student_name_or_path:
        config_of(plan, recipe)
        commit = commit_of(shape.student_name_or_path, shape.student_revision)
        return digest([model_fingerprint(shape.student_name_or_path, commit), seed])
    facts: dict[str, Any] = config_of(plan, recipe).to_dict()
    for name in ("transformers_version", "_name_or_path", "architectures", "dtype"):
        facts.pop(name, None)
    copied: list[Any] = []
    name = str(plan.config.teacher_model_name_or_path)
    commit = commit_of(name, plan.config.teacher_model_revision)
    if shape.student_init == "copy":
        layers = shape.copied_layers(plan.teacher_config().get_text_config().num_hidden_layers)
        copied = [layers, model_fingerprint(name, commit)]
    if shape.student_embeddings != "random":
        copied += [shape.student_embeddings, model_fingerprint(name, commit)]
    return digest([facts, seed, copied])


def make_student(plan: Plan, recipe: Recipe) -> Any:
    """The student's body: new weights from the seed, copied layers, or a model that exists.

    With the teacher's embeddings it comes as a `LatentStudent`, with the projection they are seen
    through.
    """
    shape = recipe.build_one(StudentShape)
    with whole_weights():
        if shape.student_name_or_path:
            return load_model(
                shape.student_name_or_path,
                revision=shape.student_revision,
                key="student_name_or_path",
                head="none",
            )
        student = new_student(
            config_of(plan, recipe), seed=int(recipe.settings["seed"]), head="none"
        )
        if (shape.student_init, shape.student_embeddings) == ("random", "random"):
            return student
        teacher: Any = load_model(
            str(plan.config.teacher_model_name_or_path),
            revision=plan.config.teacher_model_revision,
            key="teacher_model_name_or_path",
            head="none",
        )
        if shape.student_init == "copy":
            depth = teacher.config.get_text_config().num_hidden_layers
            copy_layers(student, teacher, shape.copied_layers(depth))
            return student
        return with_projection(student, take_embeddings(student, teacher))
