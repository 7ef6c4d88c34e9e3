"""The learning system: config → tasks → rollouts → advantages → samples → update → publish → report."""
