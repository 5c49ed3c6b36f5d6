"""Hypernetworks in NovelAI's layout, under the name by which other code imports them; see `networks.hypernetwork`."""

from networks.hypernetwork import ContextMLP, HypernetworkNetwork, create_network, create_network_from_weights

__all__ = ["ContextMLP", "HypernetworkNetwork", "create_network", "create_network_from_weights"]
