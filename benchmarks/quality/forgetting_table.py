"""The figures of `forgetting.py`: means over seeds, beside what is published and whether it came out here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

SCALED = "plain"
AVERAGE = "average of the seeds"

Figures = dict[str, Any]

PUBLISHED: dict[str, str] = {
    "plain": "fine-tuning on one domain forgets the other (Kalajdzievski 2024)",
    "replay 1 %": "1 % of replay prevents forgetting (Bethune et al. 2025)",
    "replay 5 %": "1 % of replay prevents forgetting (Bethune et al. 2025)",
    "replay 25 %": "more replay forgets less; it may help the task (Kotha and Liang 2026)",
    "own text 5 %": "self-generated replay nearly eliminates forgetting, not near capacity (2605.26097)",
    "kl_to_base 0.5": "KL to the base retains; on-policy data does more (RL's Razor 2025, Retaining by Doing 2026)",
    "l2_sp 1": "a pull to the start retains less than LoRA itself does (Biderman et al. 2024)",
    "rank 2": "a lower rank learns less and forgets less (Biderman et al. 2024)",
    "rate / 3": "a lower rate learns less and forgets less (Biderman et al. 2024)",
    "budget": "early stopping trades gain for retention (Kalajdzievski 2024: no way around)",
    "scaling": "losses along base-to-tuned are convex; in between is a better trade (WiSE-FT 2021, LM-Cocktail 2023)",
    AVERAGE: "an average of runs does better than each (model soups 2022)",
}


def summary(rows: Sequence[Figures]) -> Figures:
    """Return the figures by world and arm."""
    worlds = list(dict.fromkeys(row["world"] for row in rows))
    return {world: _world([row for row in rows if row["world"] == world]) for world in worlds}


def _world(rows: Sequence[Figures]) -> Figures:
    runs = [row for row in rows if row["kind"] == "run"]
    arms = {}
    for name in dict.fromkeys(row["arm"] for row in runs):
        mine = [row for row in runs if row["arm"] == name]
        arms[name] = {
            "gain": _spread([row["gain"] for row in mine]),
            "forgetting": _spread([row["forgetting"] for row in mine]),
            "tokens": round(statistics.mean(row["tokens"] for row in mine)),
        }
    for name, figures in arms.items():
        pairs = _pairs(runs, name)
        if pairs and name != "plain":
            figures["removed"] = _spread([1 - one["forgetting"] / plain["forgetting"] for one, plain in pairs])
            figures["gain_kept"] = _spread([one["gain"] / plain["gain"] for one, plain in pairs])
        figures["published"] = PUBLISHED[name]
        figures["agrees"] = _AGREES.get(name, _retains)(figures)
    found: Figures = {"arms": arms}
    sweeps = [row for row in rows if row["kind"] == "sweep"]
    if sweeps:
        found["scaling"] = _scaling(sweeps)
    for row in rows:
        if row["kind"] == "soup" and "plain" in arms:
            base = next(each["base"] for each in runs if each["arm"] == "plain")
            gain, forgetting = base[0] - row["losses"][0], row["losses"][1] - base[1]
            plain = arms["plain"]
            found["average"] = {
                "gain": gain, "forgetting": forgetting, "cut_off": row["lost"],
                "published": PUBLISHED[AVERAGE],
                "agrees": gain > plain["gain"]["mean"] and forgetting < plain["forgetting"]["mean"],
            }  # fmt: skip
    return found


def _pairs(runs: Sequence[Figures], name: str) -> list[tuple[Figures, Figures]]:
    """Return (run of the arm, plain run) of each seed."""
    plain = {row["seed"]: row for row in runs if row["arm"] == "plain"}
    return [(row, plain[row["seed"]]) for row in runs if row["arm"] == name and row["seed"] in plain]


def _scaling(sweeps: Sequence[Figures]) -> Figures:
    """Return the mean curves, whether each is convex, and what a factor of 0.75 and of 0.5 costs and saves.

    Convex: no second difference below -1 % of the curve's range, for every seed.
    """
    factors = [point[0] for point in sweeps[0]["points"]]
    curves = {
        name: [statistics.mean(sweep["points"][i][column] for sweep in sweeps) for i in range(len(factors))]
        for name, column in (("task", 1), ("general", 2))
    }
    convex = {
        name: all(_is_convex([point[column] for point in sweep["points"]]) for sweep in sweeps)
        for name, column in (("task", 1), ("general", 2))
    }
    at = {factor: place for place, factor in enumerate(factors)}
    whole_gain = curves["task"][0] - curves["task"][at[1.0]]
    whole_loss = curves["general"][at[1.0]] - curves["general"][0]
    shares = {
        f"{factor:g}": {
            "gain_kept": (curves["task"][0] - curves["task"][at[factor]]) / whole_gain,
            "removed": 1 - (curves["general"][at[factor]] - curves["general"][0]) / whole_loss,
        }
        for factor in (0.5, 0.75)
    }
    return {
        "factors": factors, **curves, "convex": convex, "shares": shares, "published": PUBLISHED["scaling"],
        "agrees": all(convex.values()) and shares["0.75"]["gain_kept"] > 1 - shares["0.75"]["removed"],
    }  # fmt: skip


def _is_convex(values: Sequence[float]) -> bool:
    tolerance = 0.01 * (max(values) - min(values))
    triples = zip(values, values[1:], values[2:], strict=False)
    return all(left - 2 * middle + right >= -tolerance for left, middle, right in triples)


def _spread(values: Sequence[float]) -> Figures:
    return {
        "mean": statistics.mean(values), "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
    }  # fmt: skip


def _retains(figures: Figures) -> bool | None:
    return None if "removed" not in figures else bool(figures["removed"]["mean"] > 0.0)


def _learns_less_forgets_less(figures: Figures) -> bool | None:
    if "removed" not in figures:
        return None
    return bool(figures["removed"]["mean"] > 0.0 and figures["gain_kept"]["mean"] < 1.0)


def _removes_most(figures: Figures) -> bool | None:
    return None if "removed" not in figures else bool(figures["removed"]["mean"] > 0.5)


_AGREES: dict[str, Callable[[Figures], bool | None]] = {
    "plain": lambda figures: figures["forgetting"]["mean"] > 0.0,
    "replay 1 %": _removes_most,
    "replay 5 %": _removes_most,
    "rank 2": _learns_less_forgets_less,
    "rate / 3": _learns_less_forgets_less,
    "budget": _learns_less_forgets_less,
}


def table(found: Figures) -> str:
    """Return the figures as Markdown, which is how they stand in docs/forgetting.md."""
    lines = []
    for world, figures in found.items():
        lines += [
            f"\n**{world}**\n",
            "| arm | gain | forgetting | forgetting removed | gain kept | published | here |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, arm in figures["arms"].items():
            shares = [f"{arm[key]['mean']:.0%}" if key in arm else "" for key in ("removed", "gain_kept")]
            lines.append(
                f"| {name} | {_plus_minus(arm['gain'])} | {_plus_minus(arm['forgetting'])} | {' | '.join(shares)} | "
                f"{arm['published']} | {_verdict(arm['agrees'])} |"
            )
        if (each := figures.get("average")) is not None:
            lines.append(
                f"| average of the seeds | {each['gain']:.3f} | {each['forgetting']:.3f} | | | {each['published']} | "
                f"{_verdict(each['agrees'])} |"
            )
        if (each := figures.get("scaling")) is not None:
            parts = [
                f"at {factor} {share['gain_kept']:.0%} of the gain is kept, {share['removed']:.0%} of the loss avoided"
                for factor, share in each["shares"].items()
            ]
            convex = ", ".join(
                f"{name} {'convex' if is_so else 'not convex'}" for name, is_so in each["convex"].items()
            )
            lines.append(f"\nScaling the plain run: {'; '.join(parts)}. {convex} ({_verdict(each['agrees'])}).")
    return "\n".join(lines)


def _plus_minus(spread: Figures) -> str:
    deviation = "" if spread["deviation"] is None else f" ± {spread['deviation']:.3f}"
    return f"{spread['mean']:.3f}{deviation}"


def _verdict(agrees: bool | None) -> str:
    return "" if agrees is None else ("as published" if agrees else "not so")
