"""Generation and the loss of answers, outside training steps and in any layout."""

from nemo_pre.generation.forward import TokenSequence, answer_loss
from nemo_pre.generation.greedy import generate

__all__ = ["TokenSequence", "answer_loss", "generate"]
