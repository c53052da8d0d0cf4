"""What a run's objects were before an evaluation, put back in place after each pass."""

from pretrain_merge.evaluation.memento.memento import Memento

__all__ = ["Memento"]
