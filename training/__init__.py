"""How a run starts, stops, saves, resumes and reports."""
