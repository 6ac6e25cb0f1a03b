"""Every random number of an experiment derives from its `seed` and a purpose (docs/method.md, item 25).

purpose                         what it seeds
"class_encoder", "unet"         initial weights; with the epoch: order, timesteps and noise of a training epoch
"search", "finalists"           noise of the trials' and of the finalists' images: the same for all of a search
"table 1", "table 2"            noise of the sets that fill the tables, never that of a search
(seed of a set), i              noise of image i of that set
"search_1", "search_2"          with the trial's number: one ask of the sampler
"classifier", "search classifier", "finalist classifier"   weights and batches of classifier i
"judge"                         weights and batches of the judge, which is trained on real images
"collapse"                      noise of the images that are looked at for an early alarm
"audit", "coins"                which training images an audit leaves out
"audit", "set" or "noise"       noise of an audit's sets, and of its attacks on a model
(a classifier's seed), "augmentation"   the shifts and flips of its images
"""

import torch

from sdlab.runs.files import sha256_of_json


def derive_seed(*parts: int | str) -> int:
    """One seed (63 bits) from several numbers and words; streams with different parts are independent."""
    return int(sha256_of_json(parts)[:16], 16) >> 1


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU, so that an image's noise is the same on every device."""
    return torch.Generator().manual_seed(int(seed))
