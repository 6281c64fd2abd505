"""Domains, the documents and items that they make, and sequences packed from them."""
