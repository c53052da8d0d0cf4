"""What a forked process begins with. Imported once, by the server that all of them are forked from; it runs nothing.

No kernel is compiled here: some tests ask what the first merge of a process does.
"""

import gc

import harness.lighter  # noqa: F401

gc.disable()  # or it walks over half a million new objects again and again, and finds nothing

import lightning.pytorch  # noqa: E402, F401
import numpy  # noqa: E402, F401
import omegaconf  # noqa: E402, F401
import pytest  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402
import torch.distributed.fsdp  # noqa: E402
import torch.distributed.run  # noqa: E402
import torch.distributed.tensor.parallel  # noqa: E402, F401

import pretrain_merge.callbacks  # noqa: E402, F401

# A collection in a forked process would write to all of these, and so copy the memory that it shares.
gc.freeze()
gc.enable()
