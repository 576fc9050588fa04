"""``fewstep recipes``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from fewstep.cli.options import Json, Output


def recipes(
    name: Annotated[str | None, Parameter(help="Show this preset whole, as YAML for --config.")] = None,
    /,
    *,
    objective: Annotated[
        str | None,
        Parameter(help="Show NAME with this objective's settings, as fewstep tune --objective has them."),
    ] = None,
    json: Json = False,
) -> int:
    """List the presets, or show one whole.

    Every line of a preset is a path for --set (`optim: lr:` is `--set optim.lr=2e-4`), and all of it is a file
    for --config. Beside each preset stands what was measured with it.

    For example:

    ```
    fewstep recipes
    fewstep recipes fast > mine.yaml
    fewstep recipes fast --objective multistep
    fewstep tune teacher --data photos.zip --config mine.yaml --out run
    ```
    """
    from rich.table import Table

    from fewstep.config import dump_yaml, to_dict
    from fewstep.errors import ConfigError
    from fewstep.recipes import RECIPES, recipe
    from fewstep.runs import configure

    output = Output(False, json)
    if objective is not None and name is None:
        raise ConfigError("An objective is shown in a recipe", do=f"fewstep recipes fast --objective {objective}")
    if name is not None:
        config = recipe(name)
        config = configure(config.job, name, objective, None, config.data.source) if objective is not None else config
        output.result(to_dict(config))
        if not json:
            print(dump_yaml(config), end="")
        return 0
    table = Table("recipe", "verb", "objective", "images", "batch", "what is known", box=None)
    for key, config in RECIPES.items():
        table.add_row(key, config.job, config.objective.kind, f"{config.images:,}", str(config.batch_size), config.note)
    output.say(table)
    output.result({key: to_dict(config) for key, config in RECIPES.items()})
    return 0
