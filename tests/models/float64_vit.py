"""The parts of a vision transformer in float64, one image and head at a time."""

import math

import numpy as np

erf = np.vectorize(math.erf)

ACTIVATIONS = {
    "tanh": lambda x: (
        0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    ),
    "exact": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "quick": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def float64(tree):
    """A tree of arrays in float64."""
    if isinstance(tree, dict):
        return {name: float64(item) for name, item in tree.items()}
    return np.asarray(tree, np.float64)


def layer_norm(x, layer, epsilon=1e-6):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x * layer["scale"] + layer["bias"]


def dense(x, layer):
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def attention(x, query, key, value, output):
    """Of ``[tokens, width]``; kernels are ``[width, head, kv]``, the last reversed."""
    mixed = np.zeros(x.shape)
    for head in range(query["kernel"].shape[1]):
        q, k, v = (
            x @ layer["kernel"][:, head]
            + (layer["bias"][head] if "bias" in layer else 0)
            for layer in (query, key, value)
        )
        scores = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
        scores /= scores.sum(-1, keepdims=True)
        mixed += scores @ v @ output["kernel"][head]
    return mixed + output.get("bias", 0.0)


def patches(image, size):
    """The patches of ``[height, width, channels]``, row by row, flattened."""
    rows, columns = image.shape[0] // size, image.shape[1] // size
    return np.stack(
        [
            image[size * r : size * (r + 1), size * c : size * (c + 1)].ravel()
            for r in range(rows)
            for c in range(columns)
        ]
    )
