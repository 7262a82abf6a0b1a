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
# # DeepRec in ten minutes
#
# At the end you have a small language model that asks a recommender in words, reads what comes back, and ranks; a table
# that compares it with the recommender alone; and a few of its conversations to read. Everything runs on two CPU cores:
# the catalogue, its users and the model are made here. The method is DeepRec (arXiv 2505.16810).
#
# On Colab, first run `!git clone <this repository> jaxrec && pip install -q -c jaxrec/constraints.txt ./jaxrec`.

# %%
import json
import os
from pathlib import Path

from absl import flags

from jaxrec import config as configs
from jaxrec import report
from jaxrec.systems import SYSTEMS

flags.FLAGS.mark_as_parsed()  # grain reads absl's global flags

# "demo" takes a few minutes; "tiny" only shows that every cell runs, its model learns nothing.
variant = os.environ.get("JAXREC_NOTEBOOK_VARIANT", "demo")
workdir = Path(os.environ.get("JAXREC_NOTEBOOK_WORKDIR", f"runs/notebook-{variant}"))
config = configs.resolve_config(f"deeprec:{variant}", [])
configs.check_workdir(workdir, config)
configs.save_config(workdir, config)
deeprec = SYSTEMS["deeprec"].load()

# %% [markdown]
# ## The world
#
# Every item has a maker, an era, a genre and a mood. Users follow tastes, and now and then an *intent* that combines
# what they chose in the last two or three steps: "by the maker of the one before, but an older one". A recommender sees
# the same history; the language model can put the intent into words.

# %%
from jaxrec.data.recommendation import config_task

task = config_task(config.data, config.text, seed=0)
example = task.examples("test")[0]
for item in example.history:
    print(f"{task.catalogue.titles[item]:<22} {task.catalogue.categories[item]}")
print("next:", task.catalogue.titles[example.target], "|", task.catalogue.categories[example.target])

# %% [markdown]
# ## Train
#
# The recommender that answers queries, then a supervised start on traces of a heuristic, then two stages of
# reinforcement learning: first to use the tool, then to recommend well. Run the cell again and it goes on where it
# stopped.

# %%
deeprec.run(config, workdir, ["trm", "cold_start", "cold_rl", "rec_rl"])

# %% [markdown]
# ## The result

# %%
from rich.console import Console

result = deeprec.run(config, workdir, ["evaluate"])
Console().print(*report.result_tables(result))
for comparison in result["comparisons"]:
    print(report.comparison_line(comparison))

# %% [markdown]
# ## What the model says
#
# One conversation of the final model. The prompt ends with the open think tag; what the recommender wrote was never
# trained on.

# %%
lines = (workdir / "trajectories.jsonl").read_text().splitlines()
last = next(record for record in map(json.loads, lines) if record["stage"] == "rec_rl")
for segment in last["segments"]:
    print(f"[{segment['by']}]{segment['text']}")
print("wanted:", last["target"], "| found at rank", last["hit_rank"])

# %% [markdown]
# The page with learning curves and more conversations:

# %%
print(report.build(workdir))
