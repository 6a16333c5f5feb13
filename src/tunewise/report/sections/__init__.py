"""The report's sections, one file a subject: from `Findings` to blocks of words, tables and charts."""

from __future__ import annotations

from tunewise.lab.findings import Findings
from tunewise.report.blocks import Section
from tunewise.report.sections.batch import batch_section
from tunewise.report.sections.effects import contribution_section, interaction_section
from tunewise.report.sections.ladder import front_section, ladder_section, noise_of
from tunewise.report.sections.missing import no_methods
from tunewise.report.sections.predictions import prediction_section
from tunewise.report.sections.quality import quality_section
from tunewise.report.sections.recipe import recipe_section
from tunewise.report.sections.search import cost_section, elsewhere_section, failure_section
from tunewise.report.sections.training import training_section


def sections_of(findings: Findings) -> tuple[Section, ...]:
    """Return all sections in the order of the page; one without data says why."""
    methods = findings.methods
    about_methods = (
        (Section("methods", "The methods", "Methods", (no_methods(findings),)),)
        if methods is None
        else (
            ladder_section(methods, noise_of(findings)),
            front_section(methods, noise_of(findings)),
            contribution_section(methods),
            interaction_section(methods),
            prediction_section(methods, findings.training),
        )
    )
    return (
        batch_section(findings),
        *about_methods,
        training_section(findings),
        quality_section(findings),
        cost_section(findings),
        failure_section(findings),
        elsewhere_section(findings),
        recipe_section(findings),
    )
