//! Host side and PTX speak of the same entries and parameters.

use stunet::backend_testing::cuda;

/// A struct given by value stands in PTX with its size.
#[test]
pub(super) fn ptx_parameters_have_the_size_of_their_structs() {
    let entries = cuda::entries();
    assert!(!entries.is_empty());
    for e in &entries {
        let start = format!(".entry {}(", e.name);
        let text = e.module.text().unwrap();
        let text = text.split_once(&start).unwrap_or_else(|| panic!("{}: no {}", e.module.name, e.name)).1;
        let params = text.split_once(')').unwrap().0;
        let expected = format!(".b8 {}_param_0[{}]", e.name, e.params);
        assert!(params.trim().ends_with(&expected), "{}: {params}, expected {expected}", e.module.name);
    }
}

/// What the program holds packed is what `ptx/MANIFEST` has the sums of.
#[test]
pub(super) fn ptx_in_the_program_is_the_checked_in_files() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("ptx");
    for e in cuda::entries() {
        let file = std::fs::read_to_string(folder.join(e.module.name)).unwrap();
        assert!(e.module.text().unwrap() == file, "{}", e.module.name);
    }
}

/// An entry that nobody can run is not proved by anything.
#[test]
pub(super) fn ptx_has_no_entry_that_the_host_side_does_not_know() {
    let entries = cuda::entries();
    for e in &entries {
        for line in e.module.text().unwrap().lines().filter(|l| l.contains(".entry ")) {
            let name = line.split(".entry ").nth(1).unwrap().trim_end_matches('(');
            assert!(entries.iter().any(|k| k.name == name), "{}: {name}", e.module.name);
        }
    }
}
