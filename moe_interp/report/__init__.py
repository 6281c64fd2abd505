"""Results to one self-contained HTML page."""

from moe_interp.report.atlas import atlas_chapter, atlas_page
from moe_interp.report.counterfactual import counterfactual_chapter, counterfactual_page
from moe_interp.report.domain_router import domain_router_chapter, domain_router_page
from moe_interp.report.geometry import geometry_chapter, geometry_page
from moe_interp.report.isolation import isolation_chapter, isolation_page
from moe_interp.report.page import prompt_chapter, render_page, write_page
from moe_interp.report.pass_at_k import pass_at_k_chapter, pass_at_k_page
from moe_interp.report.router_tuning import router_tuning_chapter, router_tuning_page
from moe_interp.report.tokens import token_view

__all__ = [
    "atlas_chapter",
    "atlas_page",
    "counterfactual_chapter",
    "counterfactual_page",
    "domain_router_chapter",
    "domain_router_page",
    "geometry_chapter",
    "geometry_page",
    "isolation_chapter",
    "isolation_page",
    "pass_at_k_chapter",
    "pass_at_k_page",
    "prompt_chapter",
    "render_page",
    "router_tuning_chapter",
    "router_tuning_page",
    "token_view",
    "write_page",
]
