"""What a person sees: escaped text, tables, heat-maps, figures, live curves."""
