//! Pure plans: mesh, flat layout, schedules, memory and traffic estimates.
