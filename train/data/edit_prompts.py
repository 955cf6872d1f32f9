"""Which prompts are edits of one another: ``source.same`` of a recipe. No torch is needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from hipa_deploy.errors import HipaError
from hipa_deploy.patterns import Patterns


def check_related(prompts: list[str], same: str | None) -> None:
    """Check that an edit leads anywhere; without ``same`` that is the user's own choice.

    Raises:
        HipaError: no two different prompts are related, so that every edit would lead back.

    """
    if same is None or count_alone(prompts, related_prompts(prompts, same)) < len(prompts):
        return
    raise HipaError(
        f"recipe: source.same = {same!r} relates no prompt to another one, so that no edit changes "
        "anything. Expected an expression whose group matches what an edit keeps, such as "
        "'emoji of (.*)'; or leave it out: then every prompt is an edit of every other."
    )


def count_alone(prompts: list[str], related: Callable[[int], list[int]]) -> int:
    """How many prompts are related to no other text.

    Args:
        prompts: As for ``related_prompts``.
        related: What ``related_prompts`` returns for them.

    """
    alone = 0
    seen: dict[int, bool] = {}
    for index, prompt in enumerate(prompts):
        group = related(index)
        # The groups are lists that related prompts share: each is looked through once.
        if id(group) not in seen:
            seen[id(group)] = all(prompts[other] == prompt for other in group)
        alone += seen[id(group)]
    return alone


def related_prompts(prompts: list[str], same: str | None) -> Callable[[int], list[int]]:
    """Group prompts that are edits of one another.

    Args:
        prompts: All prompts.
        same: Regular expression with one group. Prompts in which the group matches the same text
            are related; a prompt without a match is related to equal prompts only. With None all
            prompts are related.

    Returns:
        A function from a prompt's index to the indices of all related prompts, itself included.

    Example:
        >>> related = related_prompts(["3d emoji of a cat", "flat emoji of a cat"], "of (.*)")
        >>> related(0)
        [0, 1]

    """
    if same is None:
        everyone = list(range(len(prompts)))
        return lambda index: everyone

    patterns = Patterns("source.same of the recipe", seconds=60.0)
    group_of = []
    members = defaultdict[str, list[int]](list)
    for index, prompt in enumerate(prompts):
        match = patterns.search(same, prompt)
        group = match[1] if match else prompt
        group_of.append(group)
        members[group].append(index)
    return lambda index: members[group_of[index]]


def edit_starts(prompts: list[str], training: list[str], same: str | None) -> list[str]:
    """For each prompt, the prompt of the image that an edit to it can start from.

    Args:
        prompts: Prompts that edits lead to.
        training: Prompts with an image to start from.
        same: As for ``related_prompts``.

    Returns:
        The first related prompt of ``training`` for each of ``prompts``, or the prompt itself if
        there is none.

    """
    # Training prompts come first, so the smallest related index is one of them wherever one exists.
    related = related_prompts([*training, *prompts], same)
    starts = []
    for number, prompt in enumerate(prompts):
        first = min(related(len(training) + number))
        starts.append(training[first] if first < len(training) else prompt)
    return starts
