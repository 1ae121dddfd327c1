//! A whole daemon whose jobs have no network card.

use crate::lab::run;
use crate::line;
use crate::machine::OUTPUT;
use crate::mirror::{HELD_BYTES, WORDS};
use crate::site::{PLANTED, Site};
use crate::world::{OPEN, PORTS};
use dayfly_exec::standin::{JobSpec, JobState, Variable};

/// All that a job does over a network works without a network card, whatever dies on the host meanwhile; and nothing else
/// is reached.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_a_whole_daemon_has_its_network_and_reaches_nothing_else() {
    let mut site = Site::start("run_as_root = true\n").await;
    let artifacts = serde_json::json!({"paths": ["word"], "name": "result", "when": "always"});
    let client = Site::client();
    let apt = "-o Dir::Etc::sourcelist=/tmp/of-the-test.list -o Dir::Etc::sourceparts=/dev/null";
    let script = [
        &client,
        "cat file.txt",
        "echo 'deb [trusted=yes] http://deb.debian.org/apt ./' > /tmp/of-the-test.list",
        &format!("apt-get {apt} update"),
        &format!("apt-get {apt} install -y dayfly-probe"),
        "cat /usr/share/dayfly-probe/word | tee word",
        "python3 \"$(echo /usr/share/python-wheels/pip-*.whl)/pip\" install -q --root-user-action ignore --target /tmp/python \
         --index-url https://pypi.example/simple/ --cert \"$CI_SERVER_TLS_CA_FILE\" dayfly-probe",
        "PYTHONPATH=/tmp/python python3 -c 'import dayfly_probe; print(dayfly_probe.WORD)'",
        "curl -sS http://mirror.example/node.tar | tar -x -C /",
        "/opt/node/npm install --prefix /tmp/javascript --registry https://npm.example/ --cafile \"$CI_SERVER_TLS_CA_FILE\" \
         --no-audit --no-fund --no-update-notifier dayfly-probe",
        "cat /tmp/javascript/node_modules/dayfly-probe/word",
        "chmod 600 \"$SSH_KEY\"",
        "GIT_SSH_COMMAND='ssh -o StrictHostKeyChecking=accept-new -i '\"$SSH_KEY\" git clone -q git@gitlab.example:repository.git /tmp/by-ssh",
        "sed 's/^/over ssh: /' /tmp/by-ssh/file.txt",
        "timeout 60 bash -c 'exec 3<>/dev/tcp/open.example/8080'",
        "{ timeout 60 bash -c 'exec 3<>/dev/tcp/open.example/8081' || true; } 2>&1 | grep -o 'Connection refused'",
        "python3 /tmp/client.py open_job",
        "while sleep 1; do echo tick; done &",
        "curl -sS -o /dev/null -w 'held %{size_download}\\n' http://mirror.example/held",
        "kill %1",
        "python3 /tmp/client.py restart",
    ];
    let key = Variable { file: true, ..Variable::new("SSH_KEY", site.ssh.key.clone()) };
    let job = site.lab.enqueue(site.lab.spec(&script).with_artifacts(artifacts).with_variable(key));

    // Killed in the middle of a download, which goes on while nobody is there, and under the next daemon.
    site.lab.until_trace(job, "http://mirror.example/held").await;
    let half = tokio::time::timeout(crate::lab::LIMIT, site.mirror.half_sent()).await;
    assert!(half.is_ok(), "{}", site.lab.story(job));
    let carries = Site::egress();
    assert_eq!(carries.len(), 1);
    assert_eq!(site.lab.stop_daemon("KILL").await, None);
    let seen = site.lab.trace(job).len();
    site.lab.start_daemon().await;
    let goes_on = site.lab.standin.wait_for(|m| m.jobs[&job].trace.bytes.len() > seen, crate::lab::LIMIT).await;
    assert!(goes_on.is_ok(), "{}", site.lab.story(job));
    site.mirror.let_go();
    site.lab.until_trace(job, &format!("held {HELD_BYTES}")).await;
    assert_eq!(Site::egress(), carries, "it is the same process");

    // It dies: what it carried is cut, and the next connection works.
    site.lab.until_trace(job, &format!("{OUTPUT}bound")).await;
    run("kill", &["-KILL", &carries[0].to_string()]);
    let found = site.lab.until(job, JobState::Success).await;
    let trace = site.lab.trace(job);
    let says = |what: &str| line(&trace, what).to_owned();
    assert_eq!((says("cut").as_str(), says("again").as_str()), ("ConnectionResetError", "connected hello"));

    for text in ["content", "over ssh: content", WORDS[0], WORDS[1], WORDS[2], "Connection refused"] {
        assert!(trace.lines().any(|line| line.ends_with(text)), "no {text:?}\n{}", site.lab.story(job));
    }
    assert_eq!(found.artifacts.len(), 1, "{trace}");
    assert_eq!(says("devices"), "lo", "there is a card");
    assert_eq!(says("by-name"), "connected hello");
    assert_eq!(says("closed"), "ConnectionRefusedError");
    assert_eq!(says("download-beside-50-aborted"), "whole");

    // The host, its neighbours, and names that are theirs.
    assert_eq!(says("name-of-open.example"), OPEN.ip().to_string());
    let names: Vec<&str> = trace.lines().filter(|line| line.contains(&format!("{OUTPUT}name-of-not-told-"))).collect();
    assert!(names.len() == 6 && names.iter().all(|line| line.ends_with("no such name")), "{names:?}");
    let reached: Vec<&str> = trace.lines().filter(|line| line.contains(&format!("{OUTPUT}reached "))).collect();
    println!("figure isolation.host_ports {}", reached.len());
    println!("figure isolation.host_ports_tried {}", says("tried"));
    assert_eq!(reached, [""; 0]);
    assert!(says("tried").parse::<usize>().unwrap() >= 7 * PORTS.len());
    assert_eq!(site.forbidden_connections(), 0);

    // The rules of the guest's own are only for its tools' sake.
    assert_eq!(says("flush"), "0");
    assert_eq!(says("open-after-flush"), "connected hello");
    assert_eq!(says("closed-after-flush"), "ConnectionRefusedError");

    // It is told, what was refused first; so many ports are more than rows.
    for row in
        ["what this job reached", "  203.0.113.2:20000  refused ", "it is the host that the machine runs on", " more  "]
    {
        assert!(trace.contains(row), "no {row:?}\n{}", site.lab.story(job));
    }
    // It is kept, and makes a list.
    site.lab.until_released().await;
    let shown = site.lab.says(&["job", "show", &job.0.to_string(), "--json"]);
    assert!(shown.contains("\"reached\"") && shown.contains("\"203.0.113.2\""), "{shown}");
    let list = site.lab.says(&["egress", "suggest", "small"]);
    assert!(list.contains("# Of 1 jobs of class `small`") && list.contains("# Refused, "), "{list}");
    site.lab.assert_clean().await;
    assert_eq!(Site::egress(), [0; 0]);
}

/// A rule that lists what its jobs may reach, and a job that tries everything else. Its one open door to the host is found, so
/// the others would be. In the end it is cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_lists_what_is_reached_lets_nothing_else_through() {
    let mut site = Site::start(
        "run_as_root = true\n[class.egress]\nallow = [\"open.example:8080\", \"mirror.example:443\", \"other.example\"]\n\
         [[rule]]\nname = \"strict\"\nref = [\"strict\"]\nallow = true\n[rule.egress]\nmode = \"enforce\"\n\
         allow = [\"*.rebind.example\", \"*.flood.example\", \"203.0.113.2/32:20007\"]\ndeny = [\"other.example\"]\n",
    )
    .await;
    let client = Site::client();
    let script = [&client, "python3 /tmp/client.py strict_job", "echo waiting", "sleep 600"];
    let job = site.lab.enqueue(JobSpec { git_ref: "strict".into(), ..site.lab.spec(&script) });
    site.lab.until_trace(job, "address-of-no-answer").await;
    let carries = Site::egress();
    site.lab.until_trace(job, "by-name-after-all").await;
    assert_eq!(Site::egress(), carries, "no flood has ended it");
    let trace = site.lab.trace(job);
    let says = |what: &str| line(&trace, what).to_owned();
    for (what, wanted) in [
        ("address-of-no-answer", "ConnectionRefusedError"),
        ("by-name", "connected hello"),
        ("address-of-an-answer", "connected"),
        ("port-not-listed", "ConnectionRefusedError"),
        ("name-not-listed", "no such name"),
        ("server-name-listed", "spoken with"),
        ("server-name-not-listed", "ConnectionResetError"),
        ("rebound", &format!("{}, then no such name", OPEN.ip())),
        ("reached", &format!("203.0.113.2 {PLANTED}")),
        ("name-after-floods", &OPEN.ip().to_string()),
        ("ten-thousand", "10000 connected"),
        ("by-name-after-all", "connected hello"),
    ] {
        assert_eq!(says(what), wanted, "{what}\n{}", site.lab.story(job));
    }
    let rebinding = says("reached-by-rebinding");
    assert_ne!(rebinding, "connected");
    assert_eq!(site.names.asked("other.example"), 0, "a question carries bytes out");
    assert!(site.names.asked("f0.flood.example") > 0);
    let reached = trace.lines().filter(|line| line.contains(&format!("{OUTPUT}reached "))).count();
    assert_eq!((reached, site.forbidden_connections()), (1, 1), "the planted one, and no other");

    site.lab.until_trace(job, "waiting").await;
    site.lab.standin.cancel(job, true);
    site.lab.until(job, JobState::Canceled).await;
    site.lab.assert_clean().await;
    assert_eq!(Site::egress(), [0; 0]);
}
