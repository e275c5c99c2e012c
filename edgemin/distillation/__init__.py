"""Methods that teach a student, one file each: functions of tensors first, then the stage."""
