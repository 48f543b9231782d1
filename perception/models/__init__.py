"""Networks: the flagship BEVTransformer, and published networks that run the published weights.

`NETWORKS` is the table that builds, saves and loads them by name. What a network has to be, is in
`perception.models.base`.
"""

from __future__ import annotations

from typing import Any

from perception.errors import ConfigError
from perception.extensions import check_free
from perception.models.base import Network, NetworkConfig
from perception.models.bev_transformer.config import BEVTransformerConfig
from perception.models.bev_transformer.model import BEVTransformer
from perception.models.bevformer.config import BEVFormerConfig
from perception.models.bevformer.model import BEVFormer
from perception.models.mapqr.config import MapQRConfig
from perception.models.mapqr.model import MapQR
from perception.models.maptr.config import MapTRConfig
from perception.models.maptr.model import MapTR
from perception.models.maptrv2.config import MapTRv2Config
from perception.models.maptrv2.model import MapTRv2
from perception.models.sparse4d.config import Sparse4DConfig, SparseDriveConfig
from perception.models.sparse4d.model import Sparse4D, SparseDrive

NETWORKS: dict[str, tuple[type[Any], type[Any]]] = {
    "bev_transformer": (BEVTransformerConfig, BEVTransformer),
    "bevformer": (BEVFormerConfig, BEVFormer),
    "maptr": (MapTRConfig, MapTR),
    "mapqr": (MapQRConfig, MapQR),
    "maptrv2": (MapTRv2Config, MapTRv2),
    "sparse4d": (Sparse4DConfig, Sparse4D),
    "sparsedrive": (SparseDriveConfig, SparseDrive),
}

__all__ = [
    "NETWORKS",
    "Network",
    "NetworkConfig",
    "build_network",
    "network_class",
    "network_name",
    "preset_config",
    "preset_name",
    "register_network",
]


def register_network(name: str, config_class: type[Any], network_class: type[Any]) -> None:
    """Adds a network from outside the package to `NETWORKS`, under the name that its weights files hold.

    Args:
        name: of the network.
        config_class: see `perception.models.base.NetworkConfig`.
        network_class: see `perception.models.base.Network`.

    Raises:
        ConfigError: another network has this name or one of its presets, or the class lacks a part of the protocol.
    """
    present = NETWORKS.get(name, (None, None))
    check_free(present[0], config_class, f"the network {name!r}")
    check_free(present[1], network_class, f"the network {name!r}")
    wanted = {part for part in (*Network.__annotations__, *vars(Network)) if not part.startswith("_")}
    wanted -= {"config", "image_encoder"}  # of instances
    if missing := sorted(part for part in wanted if not hasattr(network_class, part)):
        raise ConfigError(
            f"the network {name!r}: {network_class.__name__} lacks {', '.join(missing)}; docs/add-a-network.md tells "
            "what they are"
        )
    others = {preset for kind, _ in NETWORKS.values() if kind is not present[0] for preset in kind.presets()}
    if taken := sorted(others & config_class.presets().keys()):
        raise ConfigError(f"the network {name!r} has a preset {taken[0]!r}, as another network has; rename it")
    NETWORKS[name] = config_class, network_class


def network_name(config: NetworkConfig) -> str:
    """The name in `NETWORKS` of the network that a config is for."""
    return next(name for name, (kind, _) in NETWORKS.items() if type(config) is kind)


def network_class(config: NetworkConfig) -> type[Network]:
    """The class of the network that a config is for."""
    return NETWORKS[network_name(config)][1]


def build_network(config: NetworkConfig) -> Network:
    """A network with random weights."""
    return NETWORKS[network_name(config)][1](config)


def preset_config(name: str) -> NetworkConfig:
    """The config of a preset, such as "nano" or "bevformer_tiny".

    Raises:
        ConfigError: no network has a preset of this name.
    """
    presets = {name: make for kind, _ in NETWORKS.values() for name, make in kind.presets().items()}
    if name not in presets:
        raise ConfigError(f"model preset is {name!r}; use one of {', '.join(presets)}")
    return presets[name]()


def preset_name(config: NetworkConfig) -> str:
    """The name of the preset that a config equals.

    Raises:
        ConfigError: it equals none.
    """
    for name, make in type(config).presets().items():
        if make() == config:
            return name
    raise ConfigError(f"no preset of {type(config).__name__} has these values; the presets have others")
