"""What would happen: measuring, spectra, policies, schedules, plans and reports.  Changes nothing."""
