"""The paper's numbers (Lomurno, D'Oria, Matteucci, ESANN 2024), and more from its authors' repositories: see `paper.yaml`."""

from importlib import resources

import yaml

NUMBERS = yaml.safe_load(resources.files(__package__).joinpath("paper.yaml").read_text(encoding="utf-8"))

DATASET_TITLES = NUMBERS["DATASET_TITLES"]  # data set -> its name in the paper's tables
DATASETS = tuple(DATASET_TITLES)
TABLE_1_CAS = NUMBERS["TABLE_1_CAS"]  # data set -> after_1 ... after_4 -> CAS (%)
TABLE_1_SECONDS = NUMBERS["TABLE_1_SECONDS"]  # data set -> after_1, after_2_or_3, after_4 -> seconds
TABLE_1_IMAGES = NUMBERS["TABLE_1_IMAGES"]  # data set -> how many images these times are for
TABLE_1_STEPS_AFTER_1 = NUMBERS["TABLE_1_STEPS_AFTER_1"]  # inference steps
TABLE_2 = NUMBERS["TABLE_2"]  # data set -> real, x1 ... x10 -> top-1 accuracy (%)
FIGURE_1_SEARCH_1 = NUMBERS["FIGURE_1_SEARCH_1"]  # data set -> parameter -> share of the main effects
FIGURE_1_SEARCH_2 = NUMBERS["FIGURE_1_SEARCH_2"]
AUTHORS_SETTINGS = NUMBERS["AUTHORS_SETTINGS"]  # data set -> the final search's optimum
AUTHORS_EFFECTIVE_RANK = NUMBERS["AUTHORS_EFFECTIVE_RANK"]  # data set -> of the Class-Encoder's class residuals
TEXT_RANGES = NUMBERS["TEXT_RANGES"]  # points of CAS gained since stage 1 (lowest, highest), % of time saved
