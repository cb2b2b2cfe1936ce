"""The experiment: every knob of a run, with the paper's value as its default.

A recipe is one TOML file, read strictly: an unknown key is an error that names the nearest known one. Each stage's file
has its own table; here they are composed. "paper silent" marks a value that the paper does not give.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from dpalign.engines.knobs import Engines, Model
from dpalign.paper.direction import evaluation_grid, objective_count
from dpalign.paper.ensemble import readings, with_members
from dpalign.paper.objectives import PAPER_OBJECTIVES, Objective, head_indices, own_name
from dpalign.recipe.reading import changed, dotted, from_mapping, load_table
from dpalign.rewards.knobs import RewardTable, heads_of, require_heads, require_names
from dpalign.rows import HEADS
from dpalign.runs.knobs import Cluster, Launch
from dpalign.runs.tables import Table
from dpalign.stages.base import Pretrain
from dpalign.stages.contrast import PolicyDPO
from dpalign.stages.data import Data
from dpalign.stages.dpo import DPO
from dpalign.stages.evaluate import Evaluation
from dpalign.stages.feasibility import Feasibility
from dpalign.stages.preference import Steering
from dpalign.stages.reinforce import PolicyGRPO
from dpalign.stages.reward import Reward
from dpalign.stages.rl import RL
from dpalign.stages.rsf import RSF
from dpalign.stages.sample import Sampling
from dpalign.stages.select import Selection
from dpalign.stages.sft import SFT
from dpalign.stages.soup import Soups
from dpalign.stages.steerlm import SteerLM
from dpalign.stages.world import World
from dpalign.train.knobs import Kernels, ReportTo, Training

__all__ = ["Compare", "Recipe", "changed", "dotted", "from_mapping", "load"]


ITERATIONS: Final = 100
"""The most that a recipe may have: all steps of a run are listed before the first."""
DIRECTION_KNOBS: Final = ("distribution", "low", "high", "center", "listed")
"""Knobs of [preference]. A recipe with objectives of its own must state one of them."""


def default_objectives(given: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The objectives of a recipe that states none.

    Without [rewards], or with one reward that has all heads of the paper's objectives: the paper's. With one head a
    reward: an objective for each. Otherwise empty.
    """
    rewards: Mapping[str, RewardTable] = given.get("rewards") or {}
    heads = heads_of(rewards, given.get("heads", HEADS))
    papers = {objective.name: objective.heads for objective in PAPER_OBJECTIVES}
    if not rewards or (
        len(rewards) == 1 and set(map(own_name, heads)) >= {h for read in papers.values() for h in read}
    ):
        return papers
    return {head.partition("/")[0]: (head,) for head in heads} if len(heads) == len(rewards) else {}


class Compare(Table):
    """The systems and ablations that `dpa compare` compares with DPA."""

    systems: tuple[str, ...] = ("dpo", "brief", "steerlm", "rsf", "rl", "soups", "best-of-n")
    """By default every system of the paper's Table 1, and what users try first. "mo-odpo" and "moc" are allowed too:
    loops of DPO and of GRPO under directions."""
    ablations: tuple[Literal["no replay", "no restart", "one half", "no LM loss"], ...] = ()
    """The loop again, each time without one of its parts; each costs about as much as the loop."""
    paper_curves: bool = False
    """Draw the paper's Fig. 4 beside the run's own. They are comparable only with a reward model of the same scale."""


class Policy(Table):
    """What fine-tunes the policy at each iteration."""

    method: tuple[Literal["rsf", "dpo", "grpo"], ...] = ("rsf",)
    """One an iteration; later iterations use the last one. rsf: fine-tune SFT on the best answers (section 2.2). dpo:
    learn from pairs of better and worse answers under a direction. grpo: learn online from the policy's own answers.
    dpo and grpo start from the last policy, and at t = 1 from SFT."""
    dpo: PolicyDPO = PolicyDPO()
    """Pairs under directions."""
    grpo: PolicyGRPO = PolicyGRPO()
    """Groups under directions."""

    @field_validator("method")
    @classmethod
    def _some_method(cls, method: tuple[str, ...]) -> tuple[str, ...]:
        if not method:
            raise ValueError('it is empty; give one method or one for each iteration, such as ["rsf", "grpo"]')
        return method

    def at(self, t: int) -> str:
        """The method of iteration t, from 1."""
        return self.method[min(t, len(self.method)) - 1]


class Recipe(Table):
    """One experiment."""

    name: str
    """Names the run folder, runs/NAME."""
    seed: int = 42
    """Paper silent; Zephyr's."""
    iterations: int = Field(4, ge=1, le=ITERATIONS)
    """T (section 3.1)."""
    replay: float = Field(0.15, ge=0, lt=1)
    """Share of original answers among the rows of each fine-tuning (section 3.1)."""
    alternate: bool = True
    """D1 and D2 take turns (section 3.1); false samples D1 at every t."""
    restart: bool = True
    """Each fine-tuning starts from SFT, not from the last policy (section 3.1)."""
    threads: int = Field(0, ge=0, le=4096)
    """CPU threads; 0 leaves the choice to torch. Results are equal bytes only at equal threads."""
    launcher: Literal["inprocess", "process", "torchrun", "accelerate"] = "process"
    """Heavy stages run here, or in a process of their own; torchrun and accelerate train in one per GPU."""
    jobs: int = Field(1, ge=1, le=256)
    """Independent steps to run side by side, heavy ones in processes of their own with `threads` of the CPU each: the
    same results, sooner. For machines without a GPU; several steps would share one."""
    processes: int = Field(1, ge=1)
    """Processes of torchrun or accelerate, over all machines."""
    launch: Launch = Launch()
    """How the processes of a training share a model."""
    cluster: Cluster = Cluster()
    """A cluster to sample and score with."""
    model: Model = Model()
    """Model."""
    pretrain: Pretrain = Pretrain()
    """A base model from scratch."""
    world: World = World()
    """The embedded world."""
    data: Data = Data()
    """Data."""
    heads: tuple[str, ...] = HEADS
    """The heads of the reward model that is trained, in order (section 3.1); the data label them."""
    rewards: dict[str, RewardTable] = Field(default_factory=dict)
    """What scores the answers; without any table, the model of [reward] alone."""
    objectives: dict[str, tuple[str, ...]] = Field(default_factory=default_objectives)
    """Each objective is the mean of the reward heads listed (section 3.1). A head of [rewards.NAME] is NAME/HEAD.
    Without this table each reward with one head is an objective."""
    reward: Reward = Reward()
    """The reward model that is trained."""
    sft: SFT = SFT(learning_rate=2e-5, epochs=1.0, context=2048, batch=128)
    """SFT as in Zephyr's recipe (section 3.1 starts from its checkpoint)."""
    steerlm: SteerLM = SteerLM()
    """SteerLM."""
    preference: Steering = Steering()
    """Directional preferences."""
    sampling: Sampling = Sampling()
    """Rejection sampling."""
    selection: Selection = Selection()
    """The choice among scored answers."""
    policy: Policy = Policy()
    """What fine-tunes the policy."""
    engines: Engines = Engines()
    """What samples and what scores."""
    finetune: Training = Training()
    """Fine-tuning of each policy."""
    kernels: Kernels = Kernels()
    """The kernels of all fine-tuning."""
    report_to: ReportTo = "none"
    """A tracker that follows all trainings live. Without one the page still shows each loss."""
    evaluation: Evaluation = Evaluation()
    """Evaluation."""
    compare: Compare = Compare()
    """Comparison."""
    feasibility: Feasibility = Feasibility()
    """Feasibility."""
    dpo: DPO = DPO()
    """DPO."""
    rl: RL = RL()
    """RL."""
    rsf: RSF = RSF()
    """Scalar rejection sampling."""
    soups: Soups = Soups()
    """Rewarded soups."""

    @property
    def objective_list(self) -> tuple[Objective, ...]:
        return tuple(Objective(name, heads) for name, heads in self.objectives.items())

    @property
    def reward_heads(self) -> tuple[str, ...]:
        """The outputs of the reward model that is trained: the heads, and those of its ensemble."""
        return with_members(self.heads, self.reward.ensemble)

    @property
    def scored_heads(self) -> tuple[str, ...]:
        """The columns of all scores, in order."""
        return heads_of(self.rewards, self.reward_heads)

    @property
    def trains_reward(self) -> bool:
        """Whether the model of [reward] is trained; else all rewards are given."""
        return not self.rewards or any(reward.trained for reward in self.rewards.values())

    @property
    def learns_rewards(self) -> bool:
        """Whether a reward model learns from ratings; else all rewards are given, `reward.probe` included."""
        return self.trains_reward and not self.reward.probe

    @property
    def has_judge(self) -> bool:
        """Whether there is a judge: a second reward model that never selects."""
        return bool(self.data.judge or self.reward.judge_probe)

    @property
    def fits_scales(self) -> bool:
        """Whether some reward's scale is fitted to the annotated answers."""
        return any(None in reward.known_scales(self.reward_heads) for reward in self.rewards.values())

    @property
    def trained_objectives(self) -> tuple[Objective, ...]:
        """The objectives by the heads of [reward]'s model alone, under its names; those that read none are left out."""
        if not self.rewards:
            return self.objective_list
        trained = {f"{name}/{head}" for name, r in self.rewards.items() if r.trained for head in self.heads}
        read = [(o.name, [h for h in self.heads_read(o) if h in trained]) for o in self.objective_list]
        return tuple(Objective(name, tuple(map(own_name, heads))) for name, heads in read if heads)

    def judged(self) -> Self:
        """The recipe as the judge's model reads it: only the heads of [reward], without an ensemble.

        Python functions that an objective also reads are left out: they rate for the judge as they do for the run.

        Raises:
            ValueError: an objective reads a model's head that the judge lacks, or only functions.
        """
        alone = {"reward": self.reward.model_copy(update={"ensemble": 0})}
        if not self.rewards:
            return self.model_copy(update=alone)
        rules = {name: r for name, r in self.rewards.items() if not (r.model or r.trained)}
        functions = {f"{name}/{head}" for name, r in rules.items() for head in r.own_heads(())}
        read = {}
        for objective in self.objective_list:
            heads = self.heads_read(objective)
            read[objective.name] = tuple(map(own_name, [h for h in heads if h not in functions] or heads))
        for name, heads in read.items():
            head_indices(Objective(name, heads), self.heads)
        return self.model_copy(update=alone | {"rewards": {}, "objectives": read})

    def heads_read(self, objective: Objective) -> tuple[str, ...]:
        """The heads that an objective reads, in full."""
        return tuple(self.scored_heads[index] for index in head_indices(objective, self.scored_heads))

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        """The name is one folder below runs/, never one elsewhere."""
        if not name.strip() or name.startswith(".") or not name.isprintable() or {*name} & {*r"\\/"}:
            raise ValueError(
                f"{name!r} names no folder below runs/; give one word without /, \\ or a dot in front, such as 'mine'"
            )
        return name

    @model_validator(mode="after")
    def _objectives_read_known_heads(self) -> Self:
        require_names(self.rewards)
        require_heads(self.heads)
        if not self.objectives:
            several = next(head.partition("/")[0] for head in self.scored_heads)
            raise ValueError(
                f"[objectives] is missing, and the rewards have {len(self.scored_heads)} heads "
                f"({', '.join(self.scored_heads)}); say which of them each objective reads, such as "
                f'{several} = ["{self.scored_heads[0]}"]'
            )
        for objective in self.objective_list:
            head_indices(objective, self.scored_heads)
        if self.selection.caution and len(readings(self.scored_heads, self.objective_list)) < 2:
            raise ValueError(
                f"selection.caution is {self.selection.caution:g}, and nothing says what the rewards do not know; set "
                "reward.ensemble = 8, let an objective read several [rewards], or leave caution out"
            )
        if self.reward.probe and not self.trains_reward:
            raise ValueError(
                "reward.probe gives heads to the model of [reward], and [rewards] takes others alone; leave it out, or "
                "add a table [rewards.NAME] with trained = true"
            )
        if self.data.judge and self.reward.judge_probe:
            raise ValueError(
                f"data.judge is {self.data.judge:g}, and reward.judge_probe names a finished judge; set one of the two"
            )
        if self.has_judge:
            try:
                self.judged()
            except ValueError as error:
                given = (
                    "reward.judge_probe is given" if self.reward.judge_probe else f"data.judge is {self.data.judge:g}"
                )
                cure = "leave it out" if self.reward.judge_probe else "set data.judge = 0"
                raise ValueError(f"{given}, and a judge has the heads that the data label: {error}; {cure}") from None
        return self

    def require_stated(self, layers: Sequence[Mapping[str, Any]]) -> None:
        """Refuse the recipe's own objectives if the directions are the paper's by default.

        Raises:
            ValueError: neither the layer that states the objectives nor a later one states the directions.
        """
        if list(self.objectives) == [objective.name for objective in PAPER_OBJECTIVES]:
            return
        directed = [i for i, layer in enumerate(layers) if {*DIRECTION_KNOBS} & {*_table(layer, "preference")}]
        if max(directed, default=-1) >= _objectives_stated(layers):
            return
        first, *others = self.objectives
        more, less = (
            f"{' and '.join([first, *others])}",
            f"more {' and '.join([first, *others[:-1]])}, less {others[-1]}",
        )
        if len(others) == 1:
            examples = f"low = 0, high = 90 for more {more}; low = -45, high = 0 for {less}"
        else:
            centre = ", ".join(["1"] * len(others) + ["-1"])
            examples = (
                f'distribution = "simplex" for more {more}; distribution = "cone", center = [{centre}] for {less}'
            )
        raise ValueError(
            f"[preference] does not say which directions users ask for, and [objectives] are not the paper's. Write "
            f"under [preference] {examples}"
        )

    @model_validator(mode="after")
    def _directions_weigh_the_objectives(self) -> Self:
        k, steering = len(self.objectives), self.preference
        named = f"[objectives] names {k} ({', '.join(self.objectives)})"
        if k < 2:
            raise ValueError(f"{named}; a direction weighs at least two")
        try:
            population = steering.population(k)
            steering.trained(k)
            steering.level_ends  # noqa: B018  # raises if the levels are wrong
        except ValueError as error:
            raise ValueError(f"[preference] {error}") from None
        if (weighed := objective_count(population)) != k:
            raise ValueError(
                f"preference.distribution is {steering.distribution!r} over {weighed} objectives, and {named}; "
                f"{' or '.join(_spanning(k))} fits"
            )
        reference, senses = self.evaluation.reference, self.evaluation.senses
        if len(reference) not in (0, k):
            raise ValueError(f"evaluation.reference has {len(reference)} numbers, and {named}")
        if senses and (len(senses) != k or not set(senses) <= {1, -1}):
            raise ValueError(f"evaluation.senses is {list(senses)}, and {named}; give 1 or -1 for each, or none")
        return self

    @model_validator(mode="after")
    def _prompts_have_a_form(self) -> Self:
        for name, style in (("sft", self.sft.prompt), ("dpo", self.dpo.prompt)):
            if style != "own" and self.model.chat != "zephyr":
                raise ValueError(
                    f'{name}.prompt is "{style}", a form of Zephyr\'s chats, and model.chat is "{self.model.chat}"; '
                    'leave it at "own"'
                )
        return self

    @model_validator(mode="after")
    def _methods_have_an_iteration(self) -> Self:
        if len(self.policy.method) > self.iterations:
            raise ValueError(
                f"policy.method names {len(self.policy.method)} iterations ({', '.join(self.policy.method)}), and "
                f"iterations is {self.iterations}; leave the last ones out, or raise iterations"
            )
        return self

    @model_validator(mode="after")
    def _a_stretch_has_a_middle(self) -> Self:
        stretch = self.policy.grpo.stretch
        if stretch != 1 and self.preference.distribution in ("sphere", "simplex"):
            raise ValueError(
                f"policy.grpo.stretch is {stretch:g}, and a preference.distribution of {self.preference.distribution} "
                "has no middle to turn away from; leave it at 1"
            )
        return self

    @model_validator(mode="after")
    def _processes_have_room(self) -> Self:
        spread = self.engines.tensor_parallel
        if self.cluster.address and spread > 1 and self.cluster.gpus < spread:
            raise ValueError(
                f"cluster.gpus is {self.cluster.gpus:g}, and engines.tensor_parallel spreads an engine over {spread} "
                "GPUs; an actor reserves that number"
            )
        if self.jobs > 1 and self.processes > 1:
            raise ValueError(
                f"jobs is {self.jobs}, and processes {self.processes}: a training in several processes runs alone; "
                "leave jobs at 1"
            )
        return self

    def require_evaluable(self) -> None:
        """Check that P_v can be evaluated at `evaluation.directions`; a list or a grid must use all its directions.

        Raises:
            ValueError: it cannot; names the knob and P_v, and the number of a list or a grid.
        """
        try:
            evaluation_grid(self.preference.population(len(self.objectives)), self.evaluation.directions)
        except ValueError as error:
            raise ValueError(
                f"evaluation.directions {self.evaluation.directions} of a preference.distribution of "
                f'"{self.preference.distribution}": {error}'
            ) from None


def _table(layer: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = layer.get(name)
    return table if isinstance(table, Mapping) else {}


def _objectives_stated(layers: Sequence[Mapping[str, Any]]) -> int:
    """The index of the last layer with [objectives]; if none has it, of the last that adds a reward."""
    stated = [i for i, layer in enumerate(layers) if "objectives" in layer]
    if not stated:
        named = [set(_table(layer, "rewards")) for layer in layers]
        stated = [i for i, names in enumerate(named) if names - set().union(*named[:i])]
    return max(stated, default=0)


def _spanning(k: int) -> Iterator[str]:
    """The distributions that fit k objectives; the arc fits two only."""
    if k == 2:
        yield "arc"
    yield from ("simplex", "sphere", "a cone or a list over as many")


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, with command-line overrides such as `--sampling.n 8`.

    Raises:
        ValueError: bad TOML, an unknown key, a wrong type, a number out of range, or a contradiction; the message
            names the file and the key.
    """
    return load_table(Recipe, path, overrides)
