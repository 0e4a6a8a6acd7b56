"""Measures of the similarity of answers to one question."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from rpo_lightning.core.errors import ConfigurationError, require_modules


class TextSimilarity(ABC):
    """Mean cosine similarity of pairs of texts. Subclasses turn texts into vectors."""

    def prepare(self) -> None:  # noqa: B027 (optional)
        """Load what the measure needs.

        Raises:
            ConfigurationError: Something is missing.
        """

    def fit(self, texts: Sequence[str]) -> None:  # noqa: B027 (optional)
        """Learn from typical texts how common features are. Called before ``embed``."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The vectors of texts, of unit length, [texts, size]."""

    def mean_of_pairs(self, texts: Sequence[str]) -> float:
        """Mean similarity over all pairs.

        Raises:
            ConfigurationError: There are fewer than two texts.
        """
        if len(texts) < 2:
            raise ConfigurationError(
                f"similarity needs at least two texts, got {len(texts)}: set model.continuations to at least 2"
            )
        vectors = self.embed(texts)
        products = vectors @ vectors.T
        return float(products[np.triu_indices(len(texts), 1)].mean())


class TfidfSimilarity(TextSimilarity):
    """Similarity of character n-grams weighted by TF-IDF. It needs no model.

    Args:
        longest: Most characters of an n-gram.
    """

    def __init__(self, longest: int = 4) -> None:
        if longest < 1:
            raise ConfigurationError(f"TfidfSimilarity.longest must be at least 1, got {longest}")
        self.longest = longest
        self._vectorizer: Any = None

    def prepare(self) -> None:
        """Check that scikit-learn is installed."""
        require_modules("analysis", "sklearn")

    def fit(self, texts: Sequence[str]) -> None:
        """Learn the weights of the n-grams."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, self.longest), lowercase=False).fit(texts)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The texts' weighted counts of n-grams."""
        if self._vectorizer is None:
            self.fit(texts)
        return np.asarray(self._vectorizer.transform(texts).toarray())


class EmbeddingSimilarity(TextSimilarity):
    """Similarity of the mean hidden states of an embedding model.

    Args:
        model: Hugging Face folder or hub name.
        batch_size: Texts in one forward pass.
    """

    def __init__(self, model: str, batch_size: int = 32) -> None:
        self.model = model
        self.batch_size = batch_size
        self._loaded: tuple[Any, Any] | None = None

    def prepare(self) -> None:
        """Load the model and its tokenizer."""
        self._load()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The means of the texts' last hidden states, normalised."""
        import torch

        tokenizer, model = self._load()
        vectors = []
        for start in range(0, len(texts), self.batch_size):
            batch = list(texts[start : start + self.batch_size])
            inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(model.device)
            with torch.no_grad():
                hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors.append(torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy())
        return np.concatenate(vectors)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch
            from transformers import AutoModel, AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)
                model = AutoModel.from_pretrained(self.model, trust_remote_code=False)
            except (OSError, ValueError) as error:
                raise ConfigurationError(
                    f"similarity.model={self.model}: no model found there: give a folder or a reachable hub name"
                ) from error
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            self._loaded = tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        return self._loaded
