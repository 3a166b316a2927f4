"""What an arm's name says: how samples are chosen, how many, by which surrogate, and for how long they are trained on.

    METHOD[+WITHIN[:SHARE]]@KEEP[+SURROGATE][+steps]

KEEP is the share of the source that stays, or "auto": what the votes suggest. METHOD is one of `METHODS`. A "-reverse"
takes the ranking's other end, a "-joint" makes one subset for all targets. lm+moderate:0.5@0.2 is a hybrid: lm keeps as
many classes as make 0.2 of the source when moderate keeps 0.5 of each class's samples; without SHARE both keep the
square root.
"""

import math
import re
from decimal import Decimal
from typing import NamedTuple

VOTES = ("lm", "fm")
SCORES = ("el2n", "grand", "moderate", "herding", "k-centre", "retrieval", "forgetting", "cld")
OF_LOSSES = ("forgetting", "cld")
OF_TARGETS = (*VOTES, "retrieval")
INFLUENCE = "influence"
RANDOM = {"random": "classes", "random-samples": "samples", "random-balanced": "balanced"}
METHODS = (
    *VOTES, *SCORES, INFLUENCE, *(f"{name}-joint" for name in OF_TARGETS),
    *(f"{name}-reverse" for name in (*VOTES, *SCORES, INFLUENCE)), *RANDOM,
)  # fmt: skip
AUTO = "auto"
STEPS = "steps"
ARM = re.compile(
    r"(?P<method>[a-z0-9-]+)(\+(?P<within>[a-z0-9-]+)(:(?P<share>[0-9.]+))?)?"
    r"@(?P<keep>[0-9.]+|auto)(?P<options>(\+[A-Za-z0-9_.-]+)*)"
)


class ArmName(NamedTuple):
    """The parts of an arm's name; see the module's head."""

    method: str
    keep: str
    surrogate: str = ""
    """A name from `RunConfig.surrogates`; empty for `RunConfig.surrogate`."""
    steps: bool = False
    """Train as many steps as dense does, not as many epochs."""
    within: str = ""
    """What chooses the samples of each kept class: one of `SCORES` or "random"; empty where all of them stay."""
    share: str = ""

    @property
    def base(self) -> str:
        return base_of(self.method)

    @property
    def is_random(self) -> bool:
        return self.method in RANDOM

    @property
    def is_joint(self) -> bool:
        return self.method.endswith("-joint")

    @property
    def is_reverse(self) -> bool:
        return self.method.endswith("-reverse")

    @property
    def votes(self) -> bool:
        return self.base in VOTES

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that the choice needs."""
        return tuple(name for name in (self.base, self.within) if name in SCORES)

    @property
    def asks_surrogate(self) -> bool:
        """Whether a surrogate has a say: chance asks none but for how many it votes to keep, brute force asks none."""
        return self.votes or bool(self.scores) or (self.is_random and self.keep == AUTO)

    @property
    def of_target(self) -> bool:
        """Whether each target has a subset of its own."""
        return not self.is_joint and (self.base in (*OF_TARGETS, INFLUENCE) or self.within in OF_TARGETS)

    @property
    def of_chance(self) -> bool:
        """Whether each seed has a subset of its own."""
        return self.is_random or self.within == "random"

    @property
    def shares(self) -> tuple[str, str]:
        """What `prune --keep` and `--within-class` are given: shares of the classes and of each one's samples."""
        if not self.within or self.keep == AUTO:
            return self.keep, self.share
        inside = float(self.share) if self.share else math.sqrt(float(self.keep))
        return f"{float(self.keep) / inside:.6g}", f"{inside:.6g}"

    @property
    def kind(self) -> str:
        """The method with what chooses within classes: arms of one kind differ in their sizes."""
        return self.method + (f"+{self.within}" if self.within else "") + (f":{self.share}" if self.share else "")

    @property
    def by(self) -> str:
        """The surrogate in the names of stages: "-" parts those names, and so stands as "~" inside of one of them."""
        return f"+{self.surrogate.replace('-', '~')}" if self.surrogate else ""

    @property
    def chosen(self) -> str:
        """What names the choice of samples: arms that differ in their steps alone share it."""
        return f"{self.kind}@{self.keep}{self.by}"

    @property
    def trained(self) -> str:
        """What names the training, in the names of stages."""
        return self.chosen + f"+{STEPS}" * self.steps

    @property
    def same(self) -> tuple[object, ...]:
        """Equal for two names that say the same, however they say it."""
        shares = self.shares if self.keep != AUTO or not self.within else (self.keep, self.share)
        return self.method, self.within, shares, self.surrogate, self.steps


def base_of(kind: str) -> str:
    """The method without its variant: "lm" of "lm-reverse", "lm-joint" and "lm+moderate:0.5"."""
    return kind.partition("+")[0].removesuffix("-reverse").removesuffix("-joint")


def parse_arm(name: str) -> ArmName | None:
    """The parts of an arm's name; None for one without an "@", like dense, and for one that is malformed."""
    found = ARM.fullmatch(name)
    options = found["options"].split("+")[1:] if found else []
    surrogates = [option for option in options if option != STEPS]
    if not found or len(surrogates) > 1 or options.count(STEPS) > 1:
        return None
    within, share = found["within"] or "", found["share"] or ""
    return ArmName(found["method"], found["keep"], "".join(surrogates), STEPS in options, within, share)


def fault(name: str) -> str:
    """What is wrong with an arm's name; empty for a good one."""
    arm = parse_arm(name)
    if name == "dense":
        return ""
    if not arm or arm.method not in METHODS or not (arm.keep == AUTO or is_share(arm.keep)):
        return f'{name!r} is not "dense" or METHOD@KEEP with one of {", ".join(METHODS)} and 0 < KEEP <= 1 or auto'
    if arm.keep == AUTO and not arm.votes and not arm.is_random:
        return f"{name!r}: auto reads the size off votes, and {arm.base} casts none: give a share"
    if not arm.within:
        return ""
    if arm.within not in (*SCORES, "random") or not (arm.votes or arm.method == "random"):
        known = ", ".join((*SCORES, "random"))
        return f"{name!r}: a hybrid is lm, fm or random, then + and one of {known}"
    if not is_share(arm.share) and (arm.share or arm.keep == AUTO):
        return f"{name!r}: give the share of each class's samples, like {arm.method}+{arm.within}:0.5@{arm.keep}"
    if arm.keep != AUTO and float(arm.shares[0]) > 1:
        return f"{name!r}: all classes with {arm.share} of their samples are less than {arm.keep}: raise SHARE"
    return ""


def normalised(name: str) -> str:
    """The one spelling of an arm's name: lm@.50+steps+big is lm@0.5+big+steps. Malformed ones stay as they are."""
    arm = parse_arm(name)
    if arm is None or fault(name):
        return name
    share, keep = (plain(text) if text and text != AUTO else text for text in (arm.share, arm.keep))
    kind = arm._replace(share=share).kind
    return f"{kind}@{keep}" + "".join(f"+{part}" for part in (arm.surrogate, STEPS * arm.steps) if part)


def plain(share: str) -> str:
    """A share without needless digits: ".50" -> "0.5", "1.0" -> "1"."""
    return f"{Decimal(repr(float(share))).normalize():f}"


def is_share(text: str) -> bool:
    return bool(re.fullmatch(r"0?\.[0-9]+|1(\.0*)?", text)) and float(text) > 0
