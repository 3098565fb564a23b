"""How good a model is: held-out loss and perplexity, and accuracy on multiple choice."""

from .choices import ChoiceItem, ChoiceResult, choice_accuracy, choice_log_likelihoods
from .likelihood import LossResult, evaluate_loss

__all__ = ["ChoiceItem", "ChoiceResult", "LossResult", "choice_accuracy", "choice_log_likelihoods", "evaluate_loss"]
