"""How good a model is: held-out loss and perplexity, and accuracy on multiple choice."""

from ..data import ChoiceItem
from .choices import NORMALIZATIONS, ChoiceResult, choice_accuracies, choice_accuracy, choice_log_likelihoods
from .likelihood import LossResult, evaluate_loss

__all__ = [
    "NORMALIZATIONS",
    "ChoiceItem",
    "ChoiceResult",
    "LossResult",
    "choice_accuracies",
    "choice_accuracy",
    "choice_log_likelihoods",
    "evaluate_loss",
]
