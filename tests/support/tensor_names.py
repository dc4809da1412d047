"""Names of single tensors from native to converted and back, by the table that the converter pairs them with."""

from molmo2.convert.names import LAYER_NUMBER, TABLE

ROWS = [row for row in TABLE if row.when != "tied"]
TARGETS = {row.native: row.target for row in ROWS}
NATIVES = {row.target: row.native for row in ROWS}


def target_name(native: str) -> str:
    """The converted name of a native tensor (of the embedding: its own, not that of the copy)."""
    return _translated(native, TARGETS)


def native_name(target: str) -> str:
    """The native name of a converted tensor (of the output matrix: its name in an untied model)."""
    return _translated(target, NATIVES)


def _translated(name: str, table: dict[str, str]) -> str:
    return table[LAYER_NUMBER.sub("{}", name)].format(*LAYER_NUMBER.findall(name))
