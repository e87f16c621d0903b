"""A program of ``torch.export`` as a network."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from secateur.graph.aten import read
from secateur.graph.ir import Kind, Network, Value
from secateur.graph.norms import name_norms


def from_program(program: ExportedProgram) -> Network:
    """The network that an exported program is: for analysis; what is edited is the module it came from.

    Args:
        program: as ``torch.export.export(module, args, strict=False)`` gives it, not decomposed.
    """
    network, values = Network(), dict[Node, Any]()
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = set(signature.inputs_to_lifted_tensor_constants)
    shared: dict[int, Value] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = _placeholder(node, program, names, constants, network, shared)
        elif node.op == "call_function":
            values[node] = _called(node, values, network)
        elif node.op == "output":
            leaves = torch.utils._pytree.tree_leaves(node.args)
            network.outputs = [values[leaf] for leaf in leaves if isinstance(values.get(leaf), Value)]
    name_norms(network)
    return network


def _placeholder(
    node: Node,
    program: ExportedProgram,
    names: dict[str, str],
    constants: set[str],
    network: Network,
    shared: dict[int, Value],
) -> Any:
    """What enters a program: state by name, one value for what is shared; inputs, constants."""
    example: Any = node.meta.get("val")
    shape = getattr(example, "shape", None)
    if shape is None:
        return None
    if node.name not in names:
        kind: Kind = "constant" if node.name in constants else "input"
        value = Value(tuple(shape), kind, itemsize=example.element_size())
        if value.kind == "input":
            network.inputs.append(value)
        return value
    name = names[node.name]
    tensor: Any = program.state_dict.get(name, program.constants.get(name))
    kind = "parameter" if node.name in program.graph_signature.inputs_to_parameters else "buffer"
    if name in program.graph_signature.non_persistent_buffers:
        network.transient.add(name)
    value = Value(tuple(shape), kind, name, example.element_size())
    known = shared.setdefault(tensor.data_ptr() or id(tensor), value)
    if known.name == name:
        network.state[name] = known
    else:
        network.aliases[known.name] = (*network.aliases.get(known.name, ()), name)
    return known


def _called(node: Node, values: dict[Node, Any], network: Network) -> Any:
    """What a call makes: a value, or a list of them."""

    def known(item: Any) -> Any:
        if isinstance(item, Node):
            return values.get(item)
        if isinstance(item, list | tuple):
            return [known(part) for part in item]
        return item

    args, kwargs = known(node.args), {key: known(item) for key, item in node.kwargs.items()}
    if not isinstance(node.target, torch._ops.OpOverload):
        return args[0][args[1]] if getattr(node.target, "__name__", "") == "getitem" and args[0] else None
    made: Any = node.meta.get("val")
    several = isinstance(made, list | tuple)
    tensors = [each for each in list(made if several else [made]) if hasattr(each, "shape")]
    outputs = [Value(tuple(each.shape), itemsize=each.element_size()) for each in tensors]
    if not outputs:
        return None
    stack = node.meta.get("nn_module_stack") or {}
    place = list(stack.values())[-1][0] if stack else ""
    network.operations.append(read(node.target, args, kwargs, outputs, place.removeprefix("L['self']").lstrip(".")))
    return outputs if several else outputs[0]
