"""Open Assistant trees: the path of best replies, every path, and trees that are no trees."""

import pytest
from raw_rows import messages

from tulu_jax.data import registry
from tulu_jax.data.sources import oasst

Dropped = registry.Dropped


def node(text: str, *replies: dict, role: str = "assistant", **more) -> dict:
    return {"text": text, "role": role, "replies": list(replies), **more}


def asks(text: str, *replies: dict, **more) -> dict:
    return node(text, *replies, role="prompter", **more)


def quality(value: float) -> dict:
    return {"labels": {"quality": {"value": value, "count": 3}}}


TREE = {
    "message_tree_id": "t1",
    "prompt": asks(
        "q",
        node("deleted", node("child"), deleted=True, **quality(1.0)),
        node("unlabelled"),
        node("fine", asks("open end"), **quality(0.5)),
        node("best", asks("thanks", node("welcome"), node("later")), **quality(0.75)),
    ),
}
ABOUT = {"about": {"message_tree_id": "t1"}}


def test_best_path_follows_quality():
    expected = {"messages": messages("q", "best", "thanks", "welcome")} | ABOUT
    assert oasst.best_path(TREE) == expected


def test_every_path_in_the_order_of_the_tree():
    assert oasst.leaf_paths(TREE) == [
        Dropped("deleted message"),
        {"messages": messages("q", "unlabelled")} | ABOUT,
        Dropped("path ends with the prompter"),
        {"messages": messages("q", "best", "thanks", "welcome")} | ABOUT,
        {"messages": messages("q", "best", "thanks", "later")} | ABOUT,
    ]


def test_missing_labels_count_as_zero_and_the_first_of_equals_wins():
    tree = asks("q", node("first", labels={}), node("zero", **quality(0.0)), node("none"))
    assert oasst.best_path({"prompt": tree}) == {"messages": messages("q", "first")}
    tree["replies"].append(node("more", **quality(0.01)))
    assert oasst.best_path({"prompt": tree}) == {"messages": messages("q", "more")}
    tree["replies"].insert(0, node("worse", **quality(-1.0)))
    assert oasst.best_path({"prompt": tree}) == {"messages": messages("q", "more")}


def test_best_replies_that_end_with_the_prompter_are_dropped():
    tree = asks("q", node("best", asks("?"), **quality(1.0)), node("ends well"))
    reason = "best replies end with the prompter"
    assert oasst.best_path({"prompt": tree}) == Dropped(reason)
    assert oasst.best_path({"prompt": asks("q")}) == Dropped(reason)


def test_deleted_messages_end_no_path():
    assert oasst.best_path({"prompt": asks("q", node("a"), deleted=True)}) == Dropped(
        "deleted prompt"
    )
    tree = {"prompt": asks("q", node("a", asks("gone", deleted=True)))}
    assert oasst.best_path(tree) == Dropped("best replies end with deleted messages")
    assert oasst.leaf_paths(tree) == [Dropped("deleted message")]


def test_a_tree_as_deep_as_can_be():
    tree = node("leaf")
    for depth in range(20_001):
        tree = node(str(depth), tree, role=("prompter", "assistant")[depth % 2])
    assert len(oasst.best_path({"prompt": tree})["messages"]) == 20_002
    ((path),) = oasst.leaf_paths({"prompt": tree})
    assert path["messages"][-1] == {"role": "assistant", "content": "leaf"}


@pytest.mark.parametrize("convert", [oasst.best_path, oasst.leaf_paths])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"found columns \[\]; expected 'prompt', the root message"),
        ({"prompt": "q"}, r"found columns \['prompt'\]; expected 'prompt', the root message"),
        ({"prompt": {"text": "q"}}, r"missing column 'role'"),
        ({"prompt": asks("q", node("a", role="robot"))}, r"unknown role 'robot'; expected one of"),
        ({"prompt": asks("q", node(None))}, r"column 'text' is absent or null; expected a string"),
        ({"prompt": asks("q\udc00")}, r"column 'text' is not valid Unicode"),
        ({"prompt": asks("q") | {"replies": {}}}, r"'replies' is a dict; expected a list"),
        ({"prompt": asks("q") | {"replies": [1]}}, r"'replies' is a list of int; expected a"),
    ],
)
def test_what_is_no_tree_is_refused(convert, row, message):
    with pytest.raises(ValueError, match=message):
        convert(row)


@pytest.mark.parametrize(
    "labels", [[], {"quality": 1.0}, {"quality": {"value": "1"}}, {"quality": {"value": None}}]
)
def test_a_label_without_a_number_is_refused(labels):
    tree = asks("q", node("a", labels=labels), node("b"))
    with pytest.raises(ValueError, match=r"quality label without a number; expected labels.qual"):
        oasst.best_path({"prompt": tree})
