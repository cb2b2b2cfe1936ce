"""Step 2 of section 2.2: fine-tune on the selected answers, from SFT."""

from dataclasses import replace

from dpalign.rows import CONVERSATIONS, read_rows
from dpalign.runs.environment import first_process
from dpalign.stages.cost import Costs, Load
from dpalign.stages.sample import counted, open_reader
from dpalign.stages.score import scales_of
from dpalign.stages.stage import Job, Step, chat_read, model_read, objectives_read, stage
from dpalign.stages.training import checkpoint_of, model_folder, train_policy
from dpalign.train.contract import contract_of, write_contract


def selected_cost(costs: Costs, step: Step) -> Load:
    """A training on one answer for each direction of a prompt, and on the replay (section 3.1).

    The rule "hindsight" keeps as many answers as win; the estimate ignores this.
    """
    select = costs.steps[str(step.inputs["chosen"])]
    recipe = costs.of_step(select)
    prompts, _, _ = counted(costs, costs.steps[str(select.inputs["candidates"])])
    return costs.train(step, prompts * recipe.preference.directions / (1 - recipe.replay), costs.row)


@stage(
    reads=lambda r: (
        *(r.seed, r.finetune, r.sft.checkpoint, r.preference, r.reward.template, r.rewards),
        *(*chat_read(r), *model_read(r), *objectives_read(r)),
    ),
    inputs=("start", "chosen"),
    takes="chosen",
    optional=("annotate",),
    several=True,
    asks={"t": ()},
    trains=lambda r: r.finetune,
    cost=selected_cost,
)
def finetune(job: Job) -> None:
    """Fine-tune on the selected answers, from SFT; the model's chat template takes the preference."""
    rows = read_rows(job.inputs["chosen"], CONVERSATIONS)
    train_policy(job, model_folder(job.inputs["start"]), rows, job.recipe.finetune, steered=True)
    write_dial(job)


def write_dial(job: Job) -> None:
    """Write the contract beside a policy: what its directions mean (`train/contract.py`)."""
    recipe = job.recipe
    if not first_process():
        return
    contract = contract_of(recipe, job.t, scales_of(recipe, job.inputs.get("annotate")))
    if recipe.model.own_chat is not None:
        reader = open_reader(recipe, checkpoint_of(job.out))
        assert reader.own is not None
        contract = replace(contract, place=reader.own.place, stop=reader.stop)
    write_contract(job.out / "model", contract)
