"""What a card says about the method a model was trained with."""

from __future__ import annotations

from dataclasses import dataclass


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
