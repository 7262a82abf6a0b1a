# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A simulated user that helps a recommender
#
# At the end you have a small language model that plays a user: it says of every recommended item how likely it would
# take it, and what it dislikes about a list. A recommender revises its lists by these words, a beam search keeps the
# conversations that the user likes best, and a table compares the final ranking with the recommender alone and with as
# many lists without a critique. You can read a conversation and talk to both yourself. Everything runs on two CPU
# cores: the catalogue, the conversations and the models are made here. The method is GRSU (arXiv 2504.20458).
#
# On Colab, first run `!git clone <this repository> jaxrec && pip install -q -c jaxrec/constraints.txt ./jaxrec`.

# %%
import os
from pathlib import Path

from absl import flags

from jaxrec import config as configs
from jaxrec import report
from jaxrec.systems import SYSTEMS

flags.FLAGS.mark_as_parsed()  # grain reads absl's global flags

# "demo" learns something; "tiny" only shows that every cell runs.
variant = os.environ.get("JAXREC_NOTEBOOK_VARIANT", "demo")
workdir = Path(os.environ.get("JAXREC_NOTEBOOK_WORKDIR", f"runs/notebook-grsu-{variant}"))
fewer = ["--config.data.test_dialogues=60"] if variant == "demo" else []  # 160 in the config
config = configs.resolve_config(f"grsu:{variant}", [*fewer, "--config.evaluate.arms=('crs_alone','resampled')"])
configs.check_workdir(workdir, config)
configs.save_config(workdir, config)
grsu = SYSTEMS["grsu"].load()

# %% [markdown]
# ## A conversation
#
# A seeker has one item in mind and names some of its attributes, a few in each turn. The scripted recommender hears the
# last turn alone, heeds every second wish, and likes what is popular. What the seeker has in mind is a label: neither
# the recommender nor the simulated user ever sees it.

# %%
from jaxrec.data.dialogues import spoken

run = grsu.Run(config, 0, workdir, None)
catalogue, example = run.task.catalogue, run.task.parts["test"][0]
print(spoken(example.dialogue.turns, run.task.roles))
print("in mind:", catalogue.text(example.labels[0]))

# %% [markdown]
# ## Train the user
#
# A base model is made once. Then a teacher who knows the wishes of *training* conversations criticises lists, items
# that were wished for and others become "Yes" and "No", and one model learns both. What it reads never says which item
# was in mind, and is just what it reads in the search. Run the cell again and it goes on where it stopped.

# %%
grsu.run(config, workdir, ["synthesize", "sft"])
samples = grsu.read_instructions(workdir / "instructions.jsonl")
for sample in (samples[0], samples[-1]):
    print(*sample.text, sep="", end="\n\n")

# %% [markdown]
# ## Search, and the result
#
# First lists are drawn, the user scores their items, the best lists are kept and criticised, and the recommender
# revises them, level by level. All items that any list held are ranked by their scores; nothing more is asked for that.
# "AUC" is how often the user scores the item in mind above another one.

# %%
from rich.console import Console

result = grsu.run(config, workdir, ["rl", "interact", "evaluate"])  # "rl" does nothing in the demo
Console().print(*report.result_tables(result))
for comparison in result["comparisons"]:
    print(report.comparison_line(comparison))
print(*result["notes"], sep="\n")

# %% [markdown]
# ## What was said
#
# The way to the best list of one conversation. A star marks the item in mind, the number behind an item is its score.

# %%
shown = result["samples"][0]
print(shown["dialogue"])
for number, step in enumerate(shown["rounds"], 1):
    print(f"\nlist {number}, mean score {step['reward']:.2f}", f"after: {step['critique']}" * bool(step["critique"]))
    print("  " + "\n  ".join(step["items"]))
print("\nfinal ranking:", "; ".join(shown["ranking"]))

# %% [markdown]
# ## Talk to both
#
# The words of this world are its attributes' values. In a terminal, `jaxrec chat --config=grsu --workdir=...` does the
# same turn by turn.

# %%
from jaxrec.data.dialogues import Dialogue, Turn
from jaxrec.tools.conversation import Ask, Criticise

known = catalogue.attributes[example.labels[0]]
mine = Dialogue("mine", (Turn("user", f"I want a {known['genre'][0]}, something {known['mood'][0]}."),))
(reply,) = run.recommender.recommend([Ask(mine)])
user = run.user("sft")
(scores,) = user.score([mine], [reply.items])
(critique,) = user.criticise([Criticise(mine, reply.items)])
print(mine.turns[0].text)
for item, score in zip(reply.items, scores, strict=True):
    print(f"{score:.2f}  {' '.join(catalogue.text(item).split())}")
print("the simulated user:", critique or "(nothing)")

# %% [markdown]
# The page with curves, figures by depth and more conversations:

# %%
print(report.build(workdir))
