"""Answers as records that the stages read."""

from __future__ import annotations

from typing import Any

from rlhf.label.store import Store


def records(store: Store) -> list[dict[str, Any]]:
    """A record for every answer that was not skipped, by task and labeller.

    A ranking or preference is a comparison for ``rlhf reward`` and a judge for ``rlhf evaluate``, with ``marks`` and
    ``flags`` beside the ``ranks``; a demonstration is one for ``rlhf sft``. All have the ``labeller``, the ``seconds``
    for which the page was looked at, and the further fields of what was labelled.
    """
    return [
        {
            **(store.task(given.number) or {}),
            **given.answer,
            "labeller": given.labeller,
            "seconds": round(given.seconds, 1),
        }
        for given in store.answers()
        if given.answer is not None
    ]
