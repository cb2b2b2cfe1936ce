"""`policy.method = "grpo"`: the policy learns online from its own answers under directions.

A group is n answers to one prompt under one direction v. An answer is worth v . r(x, y), less a penalty for rewards
that disagree (`selection.caution`), and is compared with the others of its group (GRPO). From SFT, without an earlier
iteration of rejection sampling, this is MOC's setting with GRPO in place of PPO.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dpalign.chat import with_system_line
from dpalign.paper.direction import draw_directions, middle_of, rng_for, stretched
from dpalign.paper.ensemble import member_objectives, value_spread
from dpalign.paper.objectives import read_objectives
from dpalign.rows import HALVES
from dpalign.stages.finetune import write_dial
from dpalign.stages.preference import line
from dpalign.stages.rl import Reinforcing, learn_online, reinforced_cost
from dpalign.stages.shards import Row
from dpalign.stages.stage import Job, chat_read, model_read, objectives_read, stage
from dpalign.stages.training import model_folder, named_checkpoint
from dpalign.train.knobs import Training

if TYPE_CHECKING:
    from dpalign.engines.tokens import PromptReader
    from dpalign.recipe import Recipe
    from dpalign.stages.rl import Lesson
    from dpalign.train.rl import Scores, Worth

Array = NDArray[np.float64]


class PolicyGRPO(Reinforcing):
    """GRPO under directions, as a learner of the loop (not in the paper)."""

    training: Training = Training(learning_rate=1e-6, steps=1000, batch=64, packing=False, loss_on="answer")
    """Its training: `steps` counts updates and `batch` answers. `epochs`, `packing`, `loss_on` and `context` are not
    used."""
    reference: Literal["start", "sft"] = "start"
    """The reference of the KL divergence: the policy that the iteration starts from, or SFT, which then reads the
    direction's line too. A LoRA can only have its start."""
    stretch: float = Field(1.0, ge=1, le=3)
    """Rank a group's answers by its direction turned away from the middle of P_v, to this multiple of its angle there;
    the line states the direction itself. v . r is nearly flat around its best answer, so a policy stops short of the
    dial's ends. 1 is Eq. 2. For arcs, grids and cones; listed directions are ranked as they are."""

    @model_validator(mode="after")
    def _a_lora_diverges_from_its_start(self) -> Self:
        if self.reference == "sft" and self.training.lora_rank:
            raise ValueError(
                f'reference is "sft", and training.lora_rank {self.training.lora_rank}: without its LoRA the model is '
                'the start of its iteration; set reference = "start", or lora_rank = 0'
            )
        return self


@stage(
    reads=lambda r: (
        *(
            r.seed,
            r.alternate,
            r.policy.method,
            r.policy.grpo,
            r.preference,
            r.selection.caution,
            r.selection.degenerate,
        ),
        *(r.sampling.max_new_tokens, r.sampling.prompt_tokens, r.reward.template, r.reward.score_tokens, r.rewards),
        *(r.sft.checkpoint, *chat_read(r), *model_read(r), *objectives_read(r)),
    ),
    inputs=("start", "data", "reward"),
    optional=("annotate", "sft"),
    several=True,
    asks={"t": (), "half": HALVES},
    trains=lambda r: r.policy.grpo.training,
    cost=lambda costs, step: reinforced_cost(costs, step, costs.of_step(step).policy.grpo),
)
def reinforce(job: Job) -> None:
    """Train the policy on its own answers under directions (GRPO), from the last policy."""
    if not named_checkpoint(job, job.recipe.policy.grpo.training):
        _train(job)
    write_dial(job)


def _train(job: Job) -> None:
    """Train, and enter the training in the ledger.

    Raises:
        ValueError: `policy.grpo.reference` is "sft", and no SFT is given.
    """
    from dpalign.train.rl import directional_reward, prompts_in_order

    recipe, settings = job.recipe, job.recipe.policy.grpo
    if settings.reference == "sft" and "sft" not in job.inputs:
        raise ValueError('policy.grpo.reference is "sft", and no SFT is given; name its folder: --sft DIR')
    reference = model_folder(job.inputs["sft"]) if settings.reference == "sft" else ""

    def lesson(prompts: Sequence[Row], count: int, scores: "Scores", reader: "PromptReader") -> "Lesson":
        reached = count * earlier(recipe, job.t)
        order = prompts_in_order(prompts, reached + count, recipe.seed)[reached:]
        groups = list(groups_of(recipe, job.t, order))
        chats = [group.pop("messages") for group in groups]
        return chats, directional_reward(scores, worth_by(recipe), reader, recipe.selection.sound), groups

    learn_online(job, settings, lesson, steered=True, reference=reference, knob="policy.grpo")


def worth_by(recipe: "Recipe") -> "Worth":
    """A function that gives v . r of answers under directions, less the penalty of `selection.caution`."""
    heads, objectives, caution = recipe.scored_heads, recipe.objective_list, recipe.selection.caution

    def worth(reward_NH: Array, v_VK: Array) -> Array:
        worth_VN: Array = v_VK @ read_objectives(reward_NH, heads, objectives).T
        if caution:
            member_NEK = member_objectives(reward_NH, heads, objectives)
            worth_VN -= caution * value_spread(member_NEK, np.broadcast_to(v_VK, (len(reward_NH), *v_VK.shape))).T
        return worth_VN

    return worth


def earlier(recipe: "Recipe", t: int) -> int:
    """The number of earlier GRPO iterations on the same half; the order of its prompts continues where they stopped."""
    learned = [s for s in range(1, t) if recipe.policy.at(s) == "grpo"]
    return sum(not recipe.alternate or (t - s) % 2 == 0 for s in learned)


def groups_of(recipe: "Recipe", t: int, prompts: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each group's prompt and direction; a prompt gets another direction in every round.

    `messages` is the chat for the policy, `asked` the chat for the rewards, `v` the direction that ranks its answers.
    """
    population = recipe.preference.trained(len(recipe.objectives))
    middle_K, stretch = middle_of(population), recipe.policy.grpo.stretch
    rounds: Counter[str] = Counter()
    for prompt in prompts:
        name, asked = prompt["prompt_id"], prompt["messages"]
        rng = rng_for(recipe.seed, "groups", t, name, rounds[name])
        rounds[name] += 1
        v_NK = draw_directions(population, 1, rng)
        messages = with_system_line(asked, line(recipe, v_NK[0]), recipe.model.chat)
        if middle_K is not None and stretch != 1:
            v_NK = stretched(v_NK, middle_K, stretch)
        yield {"messages": messages, "asked": asked, "v": v_NK[0].tolist()}
