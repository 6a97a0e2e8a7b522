//! Host side and PTX speak of the same entries and parameters.

use stunet::backend_testing::cuda;

/// A struct given by value stands in PTX with its size.
#[test]
pub(super) fn ptx_parameters_have_the_size_of_their_structs() {
    let entries = cuda::entries();
    assert!(!entries.is_empty());
    for e in &entries {
        let start = format!(".entry {}(", e.name);
        let text = e.module.text.split_once(&start).unwrap_or_else(|| panic!("{}: no {}", e.module.name, e.name)).1;
        let params = text.split_once(')').unwrap().0;
        let expected = format!(".b8 {}_param_0[{}]", e.name, e.params);
        assert!(params.trim().ends_with(&expected), "{}: {params}, expected {expected}", e.module.name);
    }
}

/// An entry that nobody can run is not proved by anything.
#[test]
pub(super) fn ptx_has_no_entry_that_the_host_side_does_not_know() {
    let entries = cuda::entries();
    for e in &entries {
        for line in e.module.text.lines().filter(|l| l.contains(".entry ")) {
            let name = line.split(".entry ").nth(1).unwrap().trim_end_matches('(');
            assert!(entries.iter().any(|k| k.name == name), "{}: {name}", e.module.name);
        }
    }
}
