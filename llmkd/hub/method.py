"""What a card says about the method a model was trained with."""

from __future__ import annotations

from dataclasses import dataclass

from llmkd.errors import HubError


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A published method as the model card names it."""

    name: str  # lower case, becomes a tag on the Hub
    title: str
    paper_title: str
    arxiv_id: str  # digits only, "2410.18779"
    bibtex: str

    @property
    def url(self) -> str:
        """The paper's page; the Hub links a model to its paper by this address."""
        return f"https://arxiv.org/abs/{self.arxiv_id}"


SALT = MethodInfo(
    name="salt",
    title="SALT (Small model Aided Large model Training)",
    paper_title=("A Little Help Goes a Long Way: Efficient LLM Training by Leveraging Small LMs"),
    arxiv_id="2410.18779",
    bibtex="""@article{rawat2024little,
  title   = {A Little Help Goes a Long Way: Efficient {LLM} Training by Leveraging Small {LMs}},
  author  = {Rawat, Ankit Singh and Sadhanala, Veeranjaneyulu and Rostamizadeh, Afshin and
             Chakrabarti, Ayan and Jitkrittum, Wittawat and Feinberg, Vladimir and Kim, Seungyeon
             and Harutyunyan, Hrayr and Saunshi, Nikunj and Nado, Zachary and Shivanna, Rakesh and
             Reddi, Sashank J. and Menon, Aditya Krishna and Anil, Rohan and Kumar, Sanjiv},
  journal = {arXiv preprint arXiv:2410.18779},
  year    = {2024}
}""",
)

ERNIE_TINY = MethodInfo(
    name="ernie-tiny",
    title="ERNIE-Tiny (four-stage progressive distillation)",
    paper_title=(
        "ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer Compression"
    ),
    arxiv_id="2106.02241",
    bibtex="""@article{su2021ernietiny,
  title   = {{ERNIE-Tiny}: A Progressive Distillation Framework for Pretrained Transformer
             Compression},
  author  = {Su, Weiyue and Chen, Xuyi and Feng, Shikun and Liu, Jiaxiang and Liu, Weixin and
             Sun, Yu and Tian, Hao and Wu, Hua and Wang, Haifeng},
  journal = {arXiv preprint arXiv:2106.02241},
  year    = {2021}
}""",
)

# Given names as far as they are known to us: not at all.
IREPO = MethodInfo(
    name="irepo",
    title="iREPO (regression of implicit reward differences on preference logits)",
    paper_title=(
        "iREPO: implicit Reward Pairwise Difference based Empirical Preference Optimization"
    ),
    arxiv_id="2405.15230",
    bibtex="""@article{le2024irepo,
  title   = {{iREPO}: implicit Reward Pairwise Difference based Empirical Preference
             Optimization},
  author  = {Le and Shu and Nguyen and Hong and Tran},
  journal = {arXiv preprint arXiv:2405.15230},
  year    = {2024}
}""",
)

# Given names as far as they are known to us: not at all.
DEQA = MethodInfo(
    name="deqa",
    title="DeQA-Score (score distributions as targets)",
    paper_title=(
        "Teaching Large Language Models to Regress Accurate Image Quality Scores using Score "
        "Distribution"
    ),
    arxiv_id="2501.11561",
    bibtex="""@inproceedings{you2025deqa,
  title     = {Teaching Large Language Models to Regress Accurate Image Quality Scores using Score
               Distribution},
  author    = {You and Cai and Gu and Xue and Dong},
  booktitle = {CVPR},
  year      = {2025},
  note      = {arXiv:2501.11561}
}""",
)

METHODS = {method.name: method for method in (SALT, ERNIE_TINY, IREPO, DEQA)}


def method_of(kind: object) -> MethodInfo:
    """The method of a run by run.json's kind; SALT where none stands there.

    Raises HubError for a kind that no method here goes by.
    """
    found = SALT if kind is None else METHODS.get(str(kind))
    if found is None:
        known = ", ".join(METHODS)
        problem = f"run.json names a kind of run that has no model card; known: {known}"
        raise HubError.of("kind", kind, problem, "push it with the llmkd that made it")
    return found
