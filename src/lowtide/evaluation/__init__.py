"""How good a model is: held-out loss and perplexity, and accuracy on multiple choice."""

from ..data import ChoiceItem
from .apart import keeps_documents_apart
from .choices import NORMALIZATIONS, ChoiceResult, choice_accuracies, choice_accuracy, choice_log_likelihoods
from .likelihood import LossResult, evaluate_loss
from .samples import Sample, answer_samples, choose_samples

__all__ = [
    "NORMALIZATIONS",
    "ChoiceItem",
    "ChoiceResult",
    "LossResult",
    "Sample",
    "answer_samples",
    "choice_accuracies",
    "choice_accuracy",
    "choice_log_likelihoods",
    "choose_samples",
    "evaluate_loss",
    "keeps_documents_apart",
]
