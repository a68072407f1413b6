"""Ray's own provider of fake machines, each a few local processes, without the one thing that it cannot do."""

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Provider(FakeMultiNodeProvider):
    """It hands "memory", which a node type must promise, to `ray start` as a resource of ours, which Ray refuses."""

    def create_node_with_resources_and_labels(
        self, node_config: dict, tags: dict, count: int, resources: dict[str, Any], labels: dict
    ) -> None:
        """Starts nodes with the memory that Ray finds."""
        others = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, others, labels)
