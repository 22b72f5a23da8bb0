"""What a run is told: settings by section, sweep settings, variants, presets, how they are merged and checked. No torch."""
