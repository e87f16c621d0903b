"""Ways to make a good file bad: bytes, trees of JSON and YAML, headers of safetensors, archives with right hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

import yaml

Mutation = Callable[[bytes, Random], bytes]

VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    7,
    2**31,
    2**63,
    10**30,
    1e308,
    float("nan"),
    0.5,
    "",
    "x",
    "F64",
    "BF16",
    "llama",
    "gpt2",
    "../canary",
    "../../canary",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "a" * 5000,
    [],
    [[]],
    {},
    {"a": {"b": []}},
    [0, 0],
    [2**40, 2**40],
    [-1, 8],
    [1] * 300,
)
"""What is put in the place of something else."""
YAMLS = (
    b"!!python/object/apply:os.system ['touch canary2']",
    b"a: &a [x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: [*c, *c, *c, *c]\n",
    b"&a {a: *a}",
    b"- 1\n- 2\n",
    b"\xff\xfe\x00",
    b"{" * 400,
    b"? [1]\n: 2\n",
    b"2026-01-01: 3\n",
)


def of_bytes(content: bytes, random: Random) -> bytes:
    """Bytes changed, cut, doubled, added."""
    found = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(found) + 1)
        kind = random.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << random.randrange(8)
        elif kind == 1 and at < len(found):
            found[at] = random.randrange(256)
        elif kind == 2:
            del found[at:]
        elif kind == 3:
            del found[at : at + random.choice((1, 4, 8, 64))]
        elif kind == 4:
            found[at:at] = random.choice((b"\0", b"\xff" * 8, b"{", b'"', b"[" * 300, b"-", b"1e999", b"\n", b"../"))
        else:
            found[at:at] = found[max(0, at - 40) : at]
    return bytes(found)


def of_tree(tree: Any, random: Random) -> Any:
    """A JSON value in which some node was replaced, removed, added or moved; the one given is changed."""
    holder: Any = [tree]
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        parent, keys = holder, [0]
        while True:
            key = random.choice(keys)
            below = parent[key]
            inner = list(below) if isinstance(below, dict) else list(range(len(below))) if _long(below) else []
            if not inner or random.random() < 0.25:
                break
            parent, keys = below, inner
        kind = random.randrange(8)
        if kind == 0 and parent is not holder:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            added = random.choice(("", "x", "../x", "shape", "__metadata__", "model.norm.weight"))
            parent[added] = deepcopy(parent[key])
        elif kind == 2 and isinstance(parent[key], int) and not isinstance(parent[key], bool):
            parent[key] += random.choice((-1, 1, 8, -8, 2**32))
        elif kind == 3 and parent is not holder:
            other = random.choice(keys)
            parent[key], parent[other] = deepcopy(parent[other]), deepcopy(parent[key])
        elif kind == 4 and isinstance(parent[key], str):
            at = random.randrange(len(parent[key]) + 1)
            parent[key] = parent[key][:at] + random.choice(("", "x", "/", "..", "\0", "9")) + parent[key][at + 1 :]
        else:
            parent[key] = deepcopy(random.choice(VALUES))
    return holder[0]


def _long(node: Any) -> bool:
    return isinstance(node, list) and bool(node)


def of_json(content: bytes, random: Random) -> bytes:
    """A JSON file with a changed tree, at times with changed bytes."""
    if random.random() < 0.2:
        return of_bytes(content, random)
    return json.dumps(of_tree(json.loads(content), random)).encode("utf-8", "surrogatepass")


def of_lines(content: bytes, random: Random) -> bytes:
    """Lines of JSON, of which one is changed, doubled, lost or moved."""
    lines = content.splitlines()
    at = random.randrange(len(lines))
    kind = random.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[random.randrange(len(lines))])
    elif kind == 2:
        return of_bytes(content, random)
    else:
        lines[at] = of_json(lines[at], random)
    return b"\n".join(lines) + b"\n"


def of_yaml(content: bytes, random: Random) -> bytes:
    """A YAML file with a changed tree, changed bytes, or something of bad repute."""
    kind = random.random()
    if kind < 0.2:
        return of_bytes(content, random)
    if kind < 0.3:
        return random.choice(YAMLS)
    tree = of_tree(yaml.safe_load(content), random)
    return json.dumps(tree).encode("utf-8", "surrogatepass")  # which is YAML as well


def of_safetensors(content: bytes, random: Random) -> bytes:
    """A safetensors file with another header, its length right; at times with a wrong length or changed bytes."""
    kind = random.random()
    length = int.from_bytes(content[:8], "little")
    if kind < 0.15:
        return of_bytes(content[: 8 + length], random) + content[8 + length :]
    if kind < 0.25:
        wrong = random.choice((0, 1, length - 1, length + 1, len(content), 2**40, 2**63, 2**64 - 1))
        return wrong.to_bytes(8, "little") + content[8:]
    if kind < 0.35:
        return content[: random.randrange(len(content))]
    if kind < 0.4:
        return content + b"\0" * random.choice((1, 8, 1000))
    header = json.loads(content[8 : 8 + length])
    meta = header.get("__metadata__")
    inner = [key for key, value in (meta or {}).items() if value[:1] in "{["]
    if inner and random.random() < 0.7:  # JSON within: what Secateur's own files say of their tensors
        key = random.choice(inner)
        meta[key] = json.dumps(of_tree(json.loads(meta[key]), random))
    else:
        header = of_tree(header, random)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def of_archive(content: bytes, random: Random) -> bytes:
    """A bits-back archive with another header or other words, its lengths and its hash right."""
    if random.random() < 0.2:
        return of_bytes(content, random)
    start = 16 + int.from_bytes(content[8:16], "little")
    header, words = content[16:start], content[start:-32]
    if random.random() < 0.7:
        header = json.dumps(of_tree(json.loads(header), random)).encode("utf-8", "surrogatepass")
    else:
        words = of_bytes(words, random)
        words = words[: len(words) // 4 * 4]
    data = content[:8] + len(header).to_bytes(8, "little") + header + words
    return data + hashlib.sha256(data).digest()


def of_onnx(content: bytes, random: Random) -> bytes:
    """An ONNX file in which some field of its graph says something else; at times with changed bytes."""
    import onnx

    if random.random() < 0.4:
        return of_bytes(content, random)
    model = onnx.ModelProto.FromString(content)
    for _ in range(random.choice((1, 1, 2, 4))):
        graph = model.graph
        node, weight = random.choice(graph.node), random.choice(graph.initializer)
        kind = random.randrange(9)
        if kind == 0 and node.input:
            node.input[random.randrange(len(node.input))] = random.choice(
                (*_names(graph), "", "absent", node.output[0])
            )
        elif kind == 1:
            node.op_type = random.choice(("Add", "Loop", "Reshape", "Transpose", "Conv", "Gemm", "Einsum", "x", ""))
        elif kind == 2 and node.attribute:
            attribute = random.choice(node.attribute)
            if attribute.ints:
                attribute.ints[random.randrange(len(attribute.ints))] = random.choice((-1, 0, 3, 2**31, 2**62))
            else:
                attribute.i = random.choice((-7, 0, 2, 2**62))
        elif kind == 3 and weight.dims:
            weight.dims[random.randrange(len(weight.dims))] = random.choice((-1, 0, 1, 7, 2**31, 2**40))
        elif kind == 4:
            weight.data_type = random.randrange(25)
        elif kind == 5:
            weight.data_location = onnx.TensorProto.EXTERNAL
            place = random.choice(("../canary", "/etc/passwd", "absent", "net.onnx", "", "a\0b", "..", "x" * 300))
            for key, value in (
                ("location", place),
                ("offset", random.choice(("0", "-1", "x", str(2**60)))),
                ("length", "8"),
            ):
                weight.external_data.add(key=key, value=value)
        elif kind == 6:
            graph.node.insert(random.randrange(len(graph.node)), node)
        elif kind == 7 and len(graph.node) > 1:
            graph.node.remove(node)
        else:
            shape = random.choice((*graph.input, *graph.output)).type.tensor_type.shape
            if shape.dim:
                random.choice(shape.dim).dim_value = random.choice((-1, 0, 3, 2**31, 2**40))
    made: bytes = model.SerializeToString()
    return made


def _names(graph: Any) -> list[str]:
    return [*(tensor.name for tensor in graph.initializer), *(name for node in graph.node for name in node.output)]
