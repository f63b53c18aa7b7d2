"""Documents of strangers."""


def names(node):
    """Every place of a document that names something."""
    if isinstance(node, dict):
        if node.get("type") == "pyref":
            yield node
        for item in node.values():
            yield from names(item)
    elif isinstance(node, list):
        for item in node:
            yield from names(item)
