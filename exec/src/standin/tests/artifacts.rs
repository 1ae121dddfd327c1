//! Artifacts up and down.

use super::*;

const BOUNDARY: &str = "multipart/form-data; boundary=cut";

fn part(content: &str) -> String {
    format!(
        "--cut\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.zip\"\r\n\r\n{content}\r\n--cut--\r\n"
    )
}

async fn upload(lab: &Lab, id: JobId, token: &str, query: &str, body: String) -> Reply {
    let path = format!("/api/v4/jobs/{id}/artifacts{query}");
    lab.send("POST", &path, &[("content-type", BOUNDARY), ("job-token", token)], body).await
}

async fn download(lab: &Lab, id: JobId, token: &str, query: &str, range: Option<&str>) -> Reply {
    let mut headers = vec![("job-token", token)];
    headers.extend(range.map(|range| ("range", range)));
    lab.send("GET", &format!("/api/v4/jobs/{id}/artifacts{query}"), &headers, "").await
}

#[tokio::test(start_paused = true)]
async fn an_archive_comes_back_as_it_went_whole_and_in_ranges() {
    let lab = Lab::new();
    let (first, token) = lab.running_job(JobSpec::default().named("build")).await;
    assert_eq!(upload(&lab, first, &token, "", part("0123456789")).await.status, 201);
    assert_eq!(lab.put(first, json!({ "token": token, "state": "success" })).await.status, 200);
    let id = lab.gitlab.enqueue(lab.project, JobSpec::default().depending_on(first));
    let payload = lab.poll(None).await.json();
    assert_eq!(payload["dependencies"][0]["artifacts_file"], json!({ "filename": "a.zip", "size": 10 }));
    let next = payload["token"].as_str().unwrap();
    assert_eq!(payload["id"], json!(id));
    let whole = download(&lab, first, next, "", None).await;
    assert_eq!((whole.status, &whole.body[..]), (200, b"0123456789".as_slice()));
    let part = download(&lab, first, next, "", Some("bytes=2-4")).await;
    assert_eq!(
        (part.status, part.header("content-range"), &part.body[..]),
        (206, Some("bytes 2-4/10"), b"234".as_slice())
    );
    assert_eq!(download(&lab, first, next, "", Some("bytes=10-")).await.status, 416);
    assert_eq!(download(&lab, first, &token, "", None).await.status, 401, "the first job is over");
    assert_eq!(download(&lab, id, next, "", None).await.status, 404);
}

#[tokio::test(start_paused = true)]
async fn remote_storage_redirects_who_asks_for_it() {
    let lab = Lab::new();
    lab.gitlab.configure(|settings| settings.remote_artifacts = true);
    let (id, token) = lab.running_job(JobSpec::default()).await;
    assert_eq!(upload(&lab, id, &token, "?artifact_type=archive", part("abc")).await.status, 201);
    assert_eq!(download(&lab, id, &token, "", None).await.status, 200);
    let reply = download(&lab, id, &token, "?direct_download=true", None).await;
    assert_eq!(reply.status, 302);
    let location: http::Uri = reply.header("location").unwrap().parse().unwrap();
    let stored = lab.send("GET", location.path_and_query().unwrap().as_str(), &[], "").await;
    assert_eq!((stored.status, &stored.body[..]), (200, b"abc".as_slice()));
    assert_eq!(lab.send("GET", location.path(), &[], "").await.status, 403);
}

#[tokio::test(start_paused = true)]
async fn other_bytes_of_the_same_type_are_refused() {
    let lab = Lab::new();
    let (id, token) = lab.running_job(JobSpec::default()).await;
    assert_eq!(upload(&lab, id, &token, "", part("one")).await.status, 201);
    assert_eq!(upload(&lab, id, &token, "", part("one")).await.status, 201);
    assert_eq!(upload(&lab, id, &token, "", part("two")).await.status, 400);
    assert_eq!(lab.gitlab.job(id).unwrap().artifacts["archive"].size, 3);
}

#[tokio::test(start_paused = true)]
async fn a_cut_upload_leaves_nothing_behind() {
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    let keep = ArtifactKeep::Directory(directory.path().to_owned());
    lab.gitlab.configure(|settings| settings.artifact_keep = keep);
    let (id, token) = lab.running_job(JobSpec::default()).await;
    let mut cut = part("0123456789");
    cut.truncate(cut.len() - 12);
    assert_eq!(upload(&lab, id, &token, "", cut).await.status, 500);
    assert!(lab.gitlab.job(id).unwrap().artifacts.is_empty());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    assert_eq!(upload(&lab, id, &token, "", part("0123456789")).await.status, 201);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    assert_eq!(&download(&lab, id, &token, "", Some("bytes=-3")).await.body[..], b"789");
}

#[tokio::test(start_paused = true)]
async fn limits_and_foreign_parts_are_refused() {
    let lab = Lab::new();
    let (id, token) = lab.running_job(JobSpec::default()).await;
    assert_eq!(upload(&lab, id, &token, "", part("x").replace("name=\"file\"", "name=\"metadata\"")).await.status, 500);
    assert_eq!(upload(&lab, id, &token, "?artifact_type=sandwich", part("x")).await.status, 400);
    assert_eq!(upload(&lab, id, "glcbt-other", "", part("x")).await.status, 403);
    lab.gitlab.edit(|model| model.projects.get_mut(&lab.project).unwrap().max_artifacts_size_mib = Some(1));
    assert_eq!(upload(&lab, id, &token, "", part(&"x".repeat((1 << 20) + 1))).await.status, 413);
    lab.gitlab.configure(|settings| settings.artifacts_enabled = false);
    assert_eq!(upload(&lab, id, &token, "", part("x")).await.status, 405);
    assert!(lab.gitlab.job(id).unwrap().artifacts.is_empty());
}

/// U31: through the API, a part's head without an end is an error, not a reason to wait
#[tokio::test(start_paused = true)]
async fn a_head_without_an_end_is_refused_and_leaves_nothing() {
    let lab = Lab::new();
    let (id, token) = lab.running_job(JobSpec::default()).await;
    let endless = format!("--cut\r\nContent-Disposition: form-data; name=\"{}", "a".repeat(8 << 20));
    assert_eq!(upload(&lab, id, &token, "", endless).await.status, 500);
    let twice = part("abc").replace("--cut--\r\n", "") + &part("def");
    assert_eq!(upload(&lab, id, &token, "", twice).await.status, 500);
    assert!(lab.gitlab.job(id).unwrap().artifacts.is_empty());
    assert_eq!(upload(&lab, id, &token, "", part("abc")).await.status, 201);
}
