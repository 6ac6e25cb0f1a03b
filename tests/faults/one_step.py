"""Runs one notebook in this process, so that a test can kill it; writes down each piece of work as it begins.

python tests/faults/one_step.py SETTINGS.yaml NN WORK.log
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["SDLAB_PROGRESS_FILE_ONLY"] = "1"

import in_process  # noqa: F401  (registers papermill's engine)
import papermill

from sdlab import evaluation, generation, latents, search, training
from sdlab.run import STEPS
from sdlab.settings import PROJECT_ROOT, Settings

settings, step, log = Settings.from_file(sys.argv[1]), STEPS[sys.argv[2]], Path(sys.argv[3])


def logged(module, name, line):
    """Let a function append `line(its arguments)` to the log before it does its work."""
    original = getattr(module, name)

    def function(*args, **kwargs):
        with log.open("a") as file:
            file.write(line(*args) + "\n")
        return original(*args, **kwargs)

    setattr(module, name, function)


logged(generation, "generate_images", lambda _, plan, indices, *__: f"shard {plan.key()} {indices[0]}")
if step.number in ("01", "03"):  # 00 times a few, for its plan
    logged(training, "noise_loss", lambda *_: "step")
logged(latents, "encode_part", lambda images, places, *_: f"latents {places.start}")
logged(
    evaluation,
    "train_classifier",
    lambda train, val, n, recipe, seed, *_: f"classifier {train.fingerprint()} {recipe} {seed}",
)
logged(search, "run_trial", lambda run, base, data, study, trial, *_: f"trial {study.study_name} {trial.number}")

papermill.execute_notebook(
    PROJECT_ROOT / "notebooks" / f"{step.stem}.ipynb", os.devnull, parameters=settings.as_dict(),
    engine_name="in-process", progress_bar=False, cwd=PROJECT_ROOT / "notebooks",
)  # fmt: skip
