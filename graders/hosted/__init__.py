"""The hosted service's forms: an episode as its graders see it, templates over that, files of samples."""
